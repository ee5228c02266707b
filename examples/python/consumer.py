"""Keeps a copy of a Flux-KV store in copy.db, each change once: python consumer.py [amqp://...]"""
import base64, json, pika, sqlite3, sys

db = sqlite3.connect("copy.db")
db.execute("CREATE TABLE IF NOT EXISTS copy (key BLOB PRIMARY KEY, value, version, partition, gap)")
db.execute("CREATE TABLE IF NOT EXISTS seen (partition INTEGER PRIMARY KEY, revision, gap)")

def order(gap):  # term and revision: the newer one of two gaps of a partition has the higher term, or else revision
    return [int(number) for number in gap.split("/")[:0:-1]] if gap else [0, 0]

def apply(event):
    partition, revision, gap, phase = (event.get(f) for f in ("partition", "revision", "gap", "phase"))
    row = db.execute("SELECT revision, gap FROM seen WHERE partition = ?", [partition]).fetchone()
    last, in_gap = row or (event.get("lost_from", revision) - 1, None)
    is_known = revision <= last or phase == "begin" and order(gap) <= order(in_gap)
    if gap != in_gap if gap and phase != "begin" else is_known:
        return  # of a gap that is over or was replaced; or a repeat: it was delivered before, and not acknowledged
    if event.get("lost_from", 0 if gap else revision) > last + 1:
        print(f"partition {partition}: nothing came between {last} and {revision}", flush=True)
    if phase == "end":  # what no row of the gap named does not exist any more
        db.execute("DELETE FROM copy WHERE partition = ? AND gap IS NOT ?", [partition, gap])
    elif phase is None:  # a change, or a row of a gap: the current value of a key, unless a newer one is here
        decode = base64.b64decode if event.get("encoding") else str.encode
        key, value = decode(event["key"]), event["value"] and decode(event["value"])
        db.execute("INSERT INTO copy VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO UPDATE SET value = ?2, version = ?3,"
                   " gap = ifnull(?5, gap) WHERE version <= ?3", [key, value, revision, partition, gap])
        db.execute("DELETE FROM copy WHERE key = ? AND value IS NULL", [key])  # it was deleted
    stays = phase != "end" and (gap or revision < order(in_gap)[1])  # in a gap
    new = [partition, last if gap and stays else revision, gap or in_gap if stays else None]
    db.execute("REPLACE INTO seen VALUES (?, ?, ?)", new)

def on_message(channel, method, properties, body):
    events = json.loads(body)  # an event, or a list of them where the nodes publish batches
    with db:  # what changes and how far it reaches are on disk together, or not at all
        for event in events if isinstance(events, list) else [events]:
            apply(event)
    channel.basic_ack(method.delivery_tag)  # not before: what is not acknowledged comes again

channel = pika.BlockingConnection(pika.URLParameters((sys.argv[1:] or ["amqp://guest:guest@localhost"])[0])).channel()
channel.exchange_declare("flux_kv_events", "topic", durable=True)
channel.queue_declare("flux-python", durable=True, arguments={"x-queue-type": "quorum", "x-single-active-consumer": True})
channel.queue_bind("flux-python", "flux_kv_events", "#")
channel.basic_qos(prefetch_count=1)  # of several, those that come again might come behind others
channel.basic_consume("flux-python", on_message)
channel.start_consuming()  # ends with the connection: let a supervisor start it again
