"""Unchanged Redis clients against the data port: redis-py, redis-cli, redis-benchmark."""

import re
import shutil
import subprocess
import threading

import pytest
import redis

import resp
import servers


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def client(flux, request):
    with redis.Redis(port=flux.port, protocol=request.param) as client:
        yield client


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def text_client(flux, request):
    with redis.Redis(
        port=flux.port, protocol=request.param, decode_responses=True, client_name="tests"
    ) as client:
        yield client


def run(*command, data=None):
    done = subprocess.run(
        [str(part) for part in command],
        input=data,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    return done.returncode, done.stdout.decode(errors="replace")


def needs(tool):
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed: apt-get install redis-tools")
    return path


def test_redis_py_binary(client):
    key, value = bytes(range(256)), bytes(range(255, -1, -1)) * 10
    assert client.set(key, value)
    assert client.get(key) == value
    assert client.strlen(key) == len(value)
    assert client.getrange(key, -3, -1) == value[-3:]
    assert client.delete(key) == 1
    assert client.get(key) is None


def test_redis_py_text(text_client):
    c = text_client
    assert c.client_getname() == "tests"
    assert c.set("k", "grüße 你好", ex=100)
    assert c.get("k") == "grüße 你好"
    assert 98 <= c.ttl("k") <= 100
    assert c.set("k", "x", nx=True) is None
    assert c.set("k", "y", xx=True, get=True) == "grüße 你好"
    assert c.incr("n", 5) == 5
    assert c.decr("n", 2) == 3
    assert c.incrbyfloat("f", 1.5) == 1.5
    assert c.append("k", "z") == 2
    assert c.mset({"{t}a": "1", "{t}b": "2"})
    assert c.mget("{t}a", "{t}b", "{t}c") == ["1", "2", None]
    assert c.msetnx({"{t}b": "3", "{t}c": "4"}) is False
    assert c.expire("n", 10, nx=True)
    assert c.persist("n")
    assert c.getdel("n") == "3"
    assert c.getex("k", px=5000) == "yz"
    assert 0 < c.pttl("k") <= 5000
    assert c.rename("{t}a", "{t}z")
    assert c.copy("{t}z", "{t}y")
    assert c.type("{t}y") == "string"
    assert c.object("encoding", "{t}y") == "int"
    assert c.dbsize() == 5
    assert sorted(c.keys("{t}*")) == ["{t}b", "{t}y", "{t}z"]
    assert c.info("server")["redis_version"]
    assert c.config_get("maxmemory")
    assert c.time()[0] > 1_700_000_000
    assert any(one["name"] == "tests" for one in c.client_list())
    assert c.flushall()
    assert c.randomkey() is None


def test_redis_py_errors(text_client):
    text_client.set("k", "abc")
    with pytest.raises(redis.ResponseError, match="not an integer"):
        text_client.incr("k")
    with pytest.raises(redis.ResponseError, match="unknown command"):
        text_client.execute_command("LPUSH", "l", "a")
    assert text_client.get("k") == "abc"


def test_redis_py_pipeline(text_client):
    pipeline = text_client.pipeline(transaction=False)
    for number in range(1000):
        pipeline.set(f"k{number}", number)
        pipeline.get(f"k{number}")
    replies = pipeline.execute()
    assert replies[0::2] == [True] * 1000
    assert replies[1::2] == [str(number) for number in range(1000)]
    pipeline.set("bad", "x").incr("bad").get("bad")
    replies = pipeline.execute(raise_on_error=False)
    assert replies[0] is True and replies[2] == "x"
    assert isinstance(replies[1], redis.ResponseError)


def test_redis_py_transaction(text_client):
    pipeline = text_client.pipeline(transaction=True)
    pipeline.set("{t}a", 1).incr("{t}a").get("{t}a").set("{t}b", "x")
    assert pipeline.execute() == [True, 2, "2", True]


def test_redis_py_compare_and_set_loses_no_increment(flux):
    """Eight clients add to one counter with WATCH, MULTI, EXEC and no lock."""
    rounds, failures = 25, []

    def add():
        try:
            with redis.Redis(port=flux.port) as client, client.pipeline() as pipeline:
                for _ in range(rounds):
                    while True:
                        try:
                            pipeline.watch("counter")
                            value = int(pipeline.get("counter") or 0)
                            pipeline.multi()
                            pipeline.set("counter", value + 1)
                            pipeline.execute()
                            break
                        except redis.WatchError:
                            continue
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    with flux.connect() as connection:
        assert connection.call("GET", "counter") == b"%d" % (8 * rounds)


def test_redis_py_cross_partition_is_refused(text_client):
    with pytest.raises(redis.ResponseError):
        text_client.msetnx({"foo": 1, "bar": 2})
    assert text_client.exists("foo", "bar") == 0


def test_scan_iter_finds_all(text_client):
    expected = {f"key:{number}" for number in range(2500)}
    text_client.mset({key: "v" for key in expected})
    text_client.set("other", "v")
    assert set(text_client.scan_iter(match="key:*", count=100)) == expected
    assert set(text_client.scan_iter()) == expected | {"other"}
    assert set(text_client.scan_iter(count=1, match="other")) == {"other"}
    assert set(text_client.scan_iter(_type="string", count=1000)) == expected | {"other"}
    assert set(text_client.scan_iter(_type="list", count=1000)) == set()


def test_scan_finds_what_stays_while_others_come_and_go(flux):
    with flux.connect() as connection, flux.connect() as changer:
        stays = {b"stay:%d" % number for number in range(2000)}
        connection.pipeline([("SET", key, "v") for key in stays])
        seen, cursor, step = set(), b"0", 0
        while True:
            cursor, keys = connection.call("SCAN", cursor, "COUNT", 50)
            seen.update(keys)
            fresh = [b"fresh:%d:%d" % (step, number) for number in range(100)]
            changer.pipeline([("SET", key, "v") for key in fresh])
            if step:
                changer.pipeline(
                    [("DEL", b"fresh:%d:%d" % (step - 1, number)) for number in range(100)]
                )
            step += 1
            if cursor == b"0":
                break
            assert step < 2000, "the scan does not end"
        assert stays <= seen


def test_info_and_client_list_fields(flux):
    with flux.connect() as connection:
        connection.call("CLIENT", "SETNAME", "me")
        info = connection.call("INFO").decode()
        for name in ["redis_version", "connected_clients", "used_memory", "db0:keys="]:
            if name == "db0:keys=":
                connection.call("SET", "k", "v")
                info = connection.call("INFO", "keyspace").decode()
            assert name in info, name
        mine = connection.call("CLIENT", "INFO").decode()
        identity = connection.call("CLIENT", "ID")
        assert re.match(rf"id={identity} ", mine)
        assert " name=me " in mine and " addr=127.0.0.1:" in mine
        listed = connection.call("CLIENT", "LIST").decode().splitlines()
        assert any(line.startswith(f"id={identity} ") for line in listed)


def test_expired_keys_leave_by_themselves(flux):
    with flux.connect() as connection:
        commands = [("SET", f"k{number}", "v", "PX", 1 + number % 50) for number in range(1000)]
        assert set(connection.pipeline(commands)) == {b"OK"}
        connection.call("SET", "stays", "v", "EX", 1000)
        servers.wait_until(lambda: connection.call("DBSIZE") == 1, "expired keys are removed", 10)


def test_client_kill(flux):
    with flux.connect() as connection, flux.connect() as victim:
        identity = victim.call("CLIENT", "ID")
        assert connection.call("CLIENT", "KILL", "ID", identity) == 1
        assert victim.closed_by_peer() == b""
        assert connection.call("PING") == b"PONG"


def test_redis_cli_one_shot(flux):
    cli = needs("redis-cli")
    assert run(cli, "-p", flux.port, "SET", "k", "a value") == (0, "OK\n")
    assert run(cli, "-p", flux.port, "GET", "k") == (0, "a value\n")
    assert run(cli, "-3", "-p", flux.port, "GET", "k") == (0, "a value\n")
    code, text = run(cli, "-e", "-p", flux.port, "INCR", "k")
    assert code != 0 and "not an integer" in text
    assert run(cli, "-p", flux.port, "--scan") == (0, "k\n")
    assert run(cli, "-p", flux.port, data=b"SET a 1\nINCR a\n") == (0, "OK\n2\n")


def test_redis_cli_pipe_mode(flux):
    cli = needs("redis-cli")
    data = b"".join(resp.encode("SET", f"key:{number}", "x" * 64) for number in range(50_000))
    code, text = run(cli, "-p", flux.port, "--pipe", data=data)
    assert code == 0 and "errors: 0, replies: 50000" in text, text
    with flux.connect() as connection:
        assert connection.call("DBSIZE") == 50_000


@pytest.mark.parametrize("pipeline", [1, 16])
def test_redis_benchmark(flux, pipeline):
    tool = needs("redis-benchmark")
    code, text = run(
        tool, "-p", flux.port, "-t", "set,get,incr,mset", "-P", pipeline, "-n", 20_000, "-c", 20,
        "-r", 10_000, "-q",
    )
    assert code == 0, text
    assert "error" not in text.lower(), text
    for name in ["SET", "GET", "INCR", "MSET"]:
        assert re.search(rf"{name}[^:\n]*: [\d.]+ requests per second", text), text
    with flux.connect() as connection:
        assert connection.call("DBSIZE") > 1000


def test_flux_cli_one_shot(flux):
    binary = servers.flux_binary()
    address = f"127.0.0.1:{flux.port}"
    with flux.connect() as connection:
        connection.call("SET", "k", "hello")
    code, text = run(binary, "cli", "--addr", address, "get", "k")
    assert code == 0 and "hello" in text, text
    code, text = run(binary, "cli", "--addr", address, "incr", "k")
    assert code != 0 and "not an integer" in text, text
