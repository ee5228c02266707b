"""The gateway's HTTP API for keys and values, good and bad requests."""

import http.client
import json
import time
import urllib.parse

import pytest
import requests


@pytest.fixture
def api(flux):
    return f"http://127.0.0.1:{flux.http_port}/api/v1/kv"


def stored(flux, key):
    with flux.connect() as connection:
        return connection.call("GET", key)


def test_form(flux, api):
    answer = requests.post(api, data={"key": "hello", "value": "world"}, timeout=10)
    assert (answer.status_code, answer.json()) == (200, {"success": True})
    assert answer.headers["content-type"].startswith("application/json")
    answer = requests.get(api, params={"key": "hello"}, timeout=10)
    assert (answer.status_code, answer.json()) == (200, {"value": "world", "found": True})
    assert stored(flux, "hello") == b"world"


def test_json(flux, api):
    answer = requests.post(api, json={"key": "grüße", "value": "你好 \u0000 \"x\""}, timeout=10)
    assert (answer.status_code, answer.json()) == (200, {"success": True})
    answer = requests.get(api, params={"key": "grüße"}, timeout=10)
    assert answer.json() == {"value": "你好 \u0000 \"x\"", "found": True}
    assert stored(flux, "grüße") == "你好 \u0000 \"x\"".encode()


def test_form_as_curl_sends_it(flux, api):
    answer = requests.post(
        api,
        data="key=hello&value=a+b%20c%26",
        headers={"content-type": "application/x-www-form-urlencoded"},
        timeout=10,
    )
    assert answer.json() == {"success": True}
    assert stored(flux, "hello") == b"a b c&"


def test_missing_key_is_404(api):
    answer = requests.get(api, params={"key": "missing"}, timeout=10)
    assert (answer.status_code, answer.json()) == (404, {"value": "", "found": False})


def test_delete(flux, api):
    requests.post(api, data={"key": "k", "value": "v"}, timeout=10)
    answer = requests.delete(api, params={"key": "k"}, timeout=10)
    assert (answer.status_code, answer.json()) == (200, {"success": True})
    assert stored(flux, "k") is None
    answer = requests.delete(api, params={"key": "k"}, timeout=10)
    assert (answer.status_code, answer.json()) == (200, {"success": True})


def test_health(flux):
    answer = requests.get(f"http://127.0.0.1:{flux.http_port}/health", timeout=10)
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "ok"
    assert body["time"]


@pytest.mark.parametrize("form", [True, False], ids=["form", "json"])
def test_ttl(flux, api, form):
    body = {"key": "k", "value": "v", "ttl": 100}
    answer = requests.post(api, timeout=10, **({"data": body} if form else {"json": body}))
    assert (answer.status_code, answer.json()) == (200, {"success": True})
    with flux.connect() as connection:
        assert 99 <= connection.call("TTL", "k") <= 100


def test_without_ttl_nothing_expires(flux, api):
    requests.post(api, data={"key": "k", "value": "v"}, timeout=10)
    with flux.connect() as connection:
        assert connection.call("TTL", "k") == -1


@pytest.mark.parametrize("ttl", ["0", "-1", "abc", "1.5", "", "9223372037", "99999999999999999999"])
def test_wrong_ttl_is_refused(flux, api, ttl):
    answer = requests.post(api, data={"key": "k", "value": "v", "ttl": ttl}, timeout=10)
    assert_refused(answer, flux)


def assert_refused(answer, flux, statuses=(400,)):
    assert answer.status_code in statuses, (answer.status_code, answer.text)
    assert answer.headers["content-type"].startswith("application/json"), answer.headers
    body = answer.json()
    assert body.get("success") is not True and body.get("error"), body
    with flux.connect() as connection:
        assert connection.call("DBSIZE") == 0


@pytest.mark.parametrize(
    "body",
    [b"value=v", b"", b"key=&value=v", b"key=k", b"key=%ff&value=v", b"key=k&value=%ff%fe",
     b"key=k&value=%zz", b"key=k&value=%f", b"key=k&value=v&tll=5", b"key=k&key=l&value=v"],
)
def test_bad_forms(flux, api, body):
    answer = requests.post(
        api,
        data=body,
        headers={"content-type": "application/x-www-form-urlencoded"},
        timeout=10,
    )
    assert_refused(answer, flux)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"key":"k"}',
        b'{"value":"v"}',
        b'{"key":"","value":"v"}',
        b'{"key":1,"value":"v"}',
        b'{"key":"k","value":["v"]}',
        b'{"key":"k","value":"v","ttl":-1}',
        b'{"key":"k","value":"v","ttl":1.5}',
        b'{"key":"k","value":"v","ttl":"100"}',
        b'{"key":"k","value":"v","tll":100}',
        b'{"key":"k","key":"l","value":"v"}',
        b'{"key":"k","value":"\xff\xfe"}',
        b'{"key":"\xc3\x28","value":"v"}',
        b'{"key":"k","value":"\\ud800"}',
        b'{"key":"k","value":"v"}x',
        b'{"key":' + b"[" * 100_000,
    ],
    ids=range(20),
)
def test_bad_json(flux, api, body):
    answer = requests.post(
        api, data=body, headers={"content-type": "application/json"}, timeout=10
    )
    assert_refused(answer, flux, (400, 422))


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "multipart/form-data"])
def test_wrong_content_type(flux, api, content_type):
    answer = requests.post(
        api, data=b"key=k&value=v", headers={"content-type": content_type}, timeout=10
    )
    assert_refused(answer, flux, (400, 415))


@pytest.mark.parametrize("query", ["", "?other=x", "?key=", "?key=%ff", "?key=%zz", "?key=%f", "?key=a&key=b"])
def test_bad_queries(flux, query):
    for method in ["GET", "DELETE"]:
        # Not by requests: it mends what is wrong with an address before it sends it.
        connection = http.client.HTTPConnection("127.0.0.1", flux.http_port, timeout=10)
        connection.request(method, "/api/v1/kv" + query)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == 400, (method, query, answer.status, body)
        assert json.loads(body).get("error")


def test_limits(flux, api):
    key, value = "k" * 65536, "v" * 1000
    assert requests.post(api, data={"key": key, "value": value}, timeout=10).status_code == 200
    assert stored(flux, key) == value.encode()
    with flux.connect() as connection:
        connection.call("FLUSHALL")
    answer = requests.post(api, data={"key": key + "k", "value": value}, timeout=10)
    assert_refused(answer, flux, (400, 413))
    answer = requests.post(api, json={"key": "k", "value": "v" * (16 << 20)}, timeout=60)
    assert answer.status_code == 200
    assert len(stored(flux, "k")) == 16 << 20
    with flux.connect() as connection:
        connection.call("FLUSHALL")
    answer = requests.post(api, json={"key": "k", "value": "v" * ((16 << 20) + 1)}, timeout=60)
    assert_refused(answer, flux, (400, 413))


def test_a_value_that_is_not_text(flux, api):
    with flux.connect() as connection:
        connection.call("SET", "k", b"\xff\x00\xfe")
    answer = requests.get(api, params={"key": "k"}, timeout=10)
    assert (answer.status_code, answer.json()) == (
        200, {"value": "/wD+", "found": True, "encoding": "base64"}
    )


def test_unknown_paths_and_methods(flux, api):
    base = f"http://127.0.0.1:{flux.http_port}"
    assert requests.get(base + "/nosuch", timeout=10).status_code == 404
    assert requests.patch(api, data={"key": "k"}, timeout=10).status_code == 405


def test_key_with_every_kind_of_character(flux, api):
    key = "a b/c?d&e=f#g%h+i\u00e9\n"
    assert requests.post(api, data={"key": key, "value": "v"}, timeout=10).status_code == 200
    answer = requests.get(f"{api}?key={urllib.parse.quote(key, safe='')}", timeout=10)
    assert answer.json() == {"value": "v", "found": True}
    assert stored(flux, key) == b"v"


def test_ttl_expires(flux, api):
    requests.post(api, data={"key": "k", "value": "v", "ttl": "1"}, timeout=10)
    end = time.monotonic() + 10
    while requests.get(api, params={"key": "k"}, timeout=10).status_code != 404:
        assert time.monotonic() < end, "the key does not expire"
