"""Keeps a copy of a Flux-KV store in copy.db, each change once: python consumer.py [amqp://...]"""
import base64, json, pika, sqlite3, sys

db = sqlite3.connect("copy.db", isolation_level=None)
db.execute("CREATE TABLE IF NOT EXISTS copy (key BLOB PRIMARY KEY, value, partition, gap)")
db.execute("CREATE TABLE IF NOT EXISTS seen (partition INTEGER PRIMARY KEY, revision, gap, at)")

def apply(event):
    partition, revision, gap, phase = (event.get(f) for f in ("partition", "revision", "gap", "phase"))
    row = db.execute("SELECT revision, gap, at FROM seen WHERE partition = ?", [partition]).fetchone()
    last, in_gap, at = row or (event.get("lost_from", revision) - 1, None, 0)
    if revision <= (last if gap is None else max(last, at)) and (gap is None or phase == "begin"):
        return  # a repeat: it was delivered before, and perhaps not acknowledged
    if gap != in_gap and gap is not None and phase != "begin":
        return  # of a gap that is over, or that a newer one has replaced
    if event.get("lost_from", 0 if gap else revision) > last + 1:
        print(f"partition {partition}: nothing came between {last} and {revision}", flush=True)
    if phase == "end":  # what no row of the gap named does not exist any more
        db.execute("DELETE FROM copy WHERE partition = ? AND gap IS NOT ?", [partition, gap])
    elif phase is None:  # a change, or a row of a gap: the current value of a key
        decode = base64.b64decode if event.get("encoding") else str.encode
        key, value = decode(event["key"]), event["value"] and decode(event["value"])
        db.execute("REPLACE INTO copy VALUES (?, ?, ?, ?)", [key, value, partition, gap])
        db.execute("DELETE FROM copy WHERE key = ? AND value IS NULL", [key])  # it was deleted
    new = (revision, None, 0) if gap is None or phase == "end" else (last, gap, max(at, revision))
    db.execute("REPLACE INTO seen VALUES (?, ?, ?, ?)", [partition, *new])

def on_message(channel, method, properties, body):
    events = json.loads(body)  # an event, or a list of them where the nodes publish batches
    db.execute("BEGIN")  # what changes and how far it reaches are on disk together, or not at all
    for event in events if isinstance(events, list) else [events]:
        apply(event)
    db.execute("COMMIT")
    channel.basic_ack(method.delivery_tag)  # not before: what is not acknowledged comes again

url = pika.URLParameters(sys.argv[1] if sys.argv[1:] else "amqp://guest:guest@localhost")
channel = pika.BlockingConnection(url).channel()
channel.exchange_declare("flux_kv_events", "topic", durable=True)
quorum = {"x-queue-type": "quorum", "x-single-active-consumer": True}
channel.queue_declare("flux-python", durable=True, arguments=quorum)
channel.queue_bind("flux-python", "flux_kv_events", "#")
channel.basic_qos(prefetch_count=100)
channel.basic_consume("flux-python", on_message)
channel.start_consuming()  # ends with the connection: let a supervisor start it again
