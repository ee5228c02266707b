"""Golden scripts: commands, and the exact bytes that a server answers.

    == a case: it starts with an empty database and fresh connections
    > SET key "a value"         a command, quoted as in redis-cli
    < +OK                       its reply, a line for each line on the wire, bytes escaped as \\xHH
    > GET missing
    < $-1                       the reply in RESP2 …
    <3 _                        … and in RESP3 where it differs
    b> GET key                  the same on a second connection
    >raw 2 PING\\r\\nPING\\r\\n     bytes as they are, and how many replies they get
    @unordered                  the lines of the next reply may come in any order
    @gone key                   waits until the key has expired
    @closed                     the server closes the connection
    @resp 2                     the case is for this version of the protocol only

A line that starts with `@server flux` makes a whole file one for Flux-KV alone. Placeholders in replies:
`{int}`, `{int:90..100}` (inclusive), `{text}` (to the end of the line), `{bulk}` (a line of its own: any
bulk string), `{rest}` (a line of its own: whatever follows).
"""

import pathlib
import re
from dataclasses import dataclass, field

import resp
import servers

FOLDER = pathlib.Path(__file__).resolve().parent
PLACEHOLDER = re.compile(r"\{(int|text|bulk|rest)(?::(-?\d+)\.\.(-?\d+))?\}")
STEP = re.compile(r"^(?P<connection>[a-z]?)>(?:(?P<raw>raw) (?P<count>\d+))? (?P<text>.*)$")


@dataclass
class Step:
    """One thing to do, and the lines that answer it."""

    source: list
    line: int
    kind: str = "command"
    connection: str = ""
    payload: bytes = b""
    replies: int = 1
    unordered: bool = False
    expected: dict = field(default_factory=dict)

    def expected_lines(self, version):
        return self.expected.get(version, self.expected.get(2, []))


@dataclass
class Case:
    name: str
    line: int
    versions: tuple = (2, 3)
    steps: list = field(default_factory=list)


@dataclass
class Script:
    path: pathlib.Path
    flux_only: bool
    # Lines of text and steps, as they stand in the file.
    items: list
    cases: list


def load(path):
    script = Script(path, False, [], [])
    unordered = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        step = STEP.match(line)
        if line.startswith("<"):
            _add_expected(script, line, path, number)
            continue
        if step:
            parsed = Step([line], number, connection=step["connection"], unordered=unordered)
            unordered = False
            if step["raw"]:
                parsed.payload, parsed.replies = unescape(step["text"]), int(step["count"])
            else:
                parsed.payload = resp.encode(*split(step["text"]))
            script.items.append(parsed)
            script.cases[-1].steps.append(parsed)
            continue
        word, _, rest = line.partition(" ")
        if word == "==":
            script.cases.append(Case(rest, number))
        elif word == "@server":
            script.flux_only = rest == "flux"
        elif word == "@resp":
            script.cases[-1].versions = (int(rest),)
        elif word == "@unordered":
            unordered = True
        elif word in ("@gone", "@closed"):
            step = Step([line], number, kind=word[1:], payload=rest.encode())
            script.items.append(step)
            script.cases[-1].steps.append(step)
            continue
        elif line and not line.startswith("#"):
            raise ValueError(f"{path.name}:{number}: not a line of a golden script: {line}")
        script.items.append(line)
    return script


def _add_expected(script, line, path, number):
    match = re.match(r"^<(3?)(?: (.*))?$", line)
    step = script.items[-1] if script.items else None
    if not match or not isinstance(step, Step):
        raise ValueError(f"{path.name}:{number}: a reply without a command: {line}")
    version = 3 if match[1] else 2
    step.expected.setdefault(version, []).append(match[2] or "")


def split(text):
    """Words in redis-cli's quoting."""
    words = []
    for word in re.findall(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|\S+", text):
        if word[0] in "\"'":
            word = word[1:-1]
        words.append(unescape(word))
    return words


def unescape(text):
    names = {"n": b"\n", "r": b"\r", "t": b"\t", "\\": b"\\", '"': b'"', "'": b"'"}

    def byte(match):
        code = match[1]
        return bytes([int(code[1:], 16)]) if code[0] == "x" else names[code]

    out, end = b"", 0
    for match in re.finditer(r"\\(x[0-9a-fA-F]{2}|[nrt\\\"'])", text):
        out += text[end : match.start()].encode() + byte(match)
        end = match.end()
    return out + text[end:].encode()


def escape(data):
    text = "".join(
        chr(b) if 32 <= b < 127 and b != 0x5C else "\\\\" if b == 0x5C else f"\\x{b:02x}"
        for b in data
    )
    # Editors strip a space at the end of a line.
    return text[:-1] + "\\x20" if text.endswith(" ") else text


def lines_of(raw):
    """A raw reply as the escaped lines of a script."""
    return [escape(line) for line in raw.split(b"\r\n")[:-1]]


def matches(expected, raw, unordered=False):
    """Whether a raw reply is what the lines say."""
    if unordered:
        return sorted(expected) == sorted(lines_of(raw))
    pattern, bounds = "", []
    for line in expected:
        if line == "{rest}":
            return _full_match(pattern + "(?s:.*)", bounds, raw)
        if line == "{bulk}":
            pattern += r"[$=]\d+\r\n(?s:.*?)\r\n"
            continue
        end = 0
        for match in PLACEHOLDER.finditer(line):
            pattern += _literal(line[end : match.start()])
            if match[1] == "text":
                pattern += r"[^\r\n]*"
            else:
                pattern += r"(-?\d+)"
                bounds.append((int(match[2]), int(match[3])) if match[2] else None)
            end = match.end()
        pattern += _literal(line[end:]) + "\r\n"
    return _full_match(pattern, bounds, raw)


def _literal(text):
    return re.escape(unescape(text).decode("latin-1"))


def _full_match(pattern, bounds, raw):
    match = re.fullmatch(pattern, raw.decode("latin-1"))
    if not match:
        return False
    return all(
        bound is None or bound[0] <= int(number) <= bound[1]
        for number, bound in zip(match.groups(), bounds)
    )


class Runner:
    """Runs a case against a server, in one version of the protocol."""

    def __init__(self, port, version):
        self.port = port
        self.version = version
        self.connections = {}

    def __enter__(self):
        with resp.Connection(self.port) as connection:
            connection.call("FLUSHALL")
        return self

    def __exit__(self, *_):
        for connection in self.connections.values():
            connection.close()

    def connection(self, name):
        if name not in self.connections:
            self.connections[name] = resp.Connection(self.port, timeout=10)
            if self.version == 3:
                self.connections[name].call("HELLO", 3)
        return self.connections[name]

    def run(self, step):
        """Does the step and returns the raw bytes that answered it."""
        connection = self.connection(step.connection)
        if step.kind == "gone":
            gone = lambda: connection.raw("EXISTS", step.payload) == b":0\r\n"
            servers.wait_until(gone, f"{step.payload} expired", 10)
            return b""
        if step.kind == "closed":
            return connection.closed_by_peer()
        connection.send(step.payload)
        return b"".join(connection.raw_reply() for _ in range(step.replies))


def scripts():
    return [load(path) for path in sorted(FOLDER.glob("*.txt"))]


def cluster_scripts():
    """Those for a node of a cluster that has all slots."""
    return [load(path) for path in sorted((FOLDER / "cluster").glob("*.txt"))]


def start_cluster_redis(directory):
    """A Redis that is a cluster of one, and serves."""
    options = ["--cluster-enabled", "yes", "--cluster-port", servers.free_port()]
    redis = servers.Redis(directory, extra=options).start()
    try:
        with redis.connect() as connection:
            connection.call("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            is_ok = lambda: b"cluster_state:ok" in connection.call("CLUSTER", "INFO")
            servers.wait_until(is_ok, "the cluster of one serves")
    except BaseException:
        redis.kill()
        raise
    return redis
