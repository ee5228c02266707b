"""Whether what clients saw of each key can be explained by one copy that operations change in turn.

Every key is checked alone, by just-in-time linearization (Lowe, "Testing for linearizability", 2017): the
calls and answers of a key are gone through by time with the set of all states that it may be in. Of an
operation that has begun, it is open whether it has taken effect; when its answer comes, it must have, with
that answer. An operation without an answer (`returned` is None) may take effect at any time after its call,
or never. A key is used as a register or as a counter;
expiry is not in the model.
"""

from dataclasses import dataclass

# Of one key in one step. With some five clients and ten operations without an answer there are hundreds.
MAX_STATES = 200_000


@dataclass(frozen=True)
class Operation:
    """One call of a client. Times are of one monotonic clock; `result` is what the server said."""

    client: str
    key: bytes
    kind: str
    argument: bytes | None
    called: float
    returned: float | None
    result: object = None

    def __str__(self):
        end = "never" if self.returned is None else f"{self.returned:.4f}"
        argument = "" if self.argument is None else f" {self.argument.decode()}"
        result = "?" if self.returned is None else self.result
        return f"{self.called:.4f}..{end} {self.client}: {self.kind} {self.key.decode()}{argument} -> {result}"


class Violation(AssertionError):
    """A history that no single copy can give."""


def apply(state, kind, argument):
    """The state after an operation, and what it answers. Absent is None."""
    match kind:
        case "get":
            return state, state
        case "set":
            return argument, b"OK"
        case "setnx":
            return (argument, b"OK") if state is None else (state, None)
        case "getdel":
            return None, state
        case "incr":
            number = int(state or 0) + 1
            return b"%d" % number, number
    raise ValueError(kind)


def check(operations):
    """Raises `Violation` for the first key that is not linearizable. Returns the number of keys."""
    keys = {}
    for operation in operations:
        if operation.kind != "get" or operation.returned is not None:
            keys.setdefault(operation.key, []).append(operation)
    for history in keys.values():
        check_key(history)
    return len(keys)


def check_key(history):
    """Checks the operations of one key, which is absent at first."""
    events = []
    for number, operation in enumerate(history):
        # At equal times calls come first: operations that touch count as concurrent.
        events.append((operation.called, 0, number))
        if operation.returned is not None:
            events.append((operation.returned, 1, number))
    events.sort()
    shown = {operation.result for operation in history if operation.returned is not None}
    # A state is the value, answered operations that have taken effect before their answer, and how many
    # of each sort of operation without an answer have. Those of a sort are interchangeable.
    states = {(None, frozenset(), frozenset())}
    pending, unanswered = set(), {}
    for _, is_answer, number in events:
        operation = history[number]
        if not is_answer and operation.returned is None:
            # Values that nobody has seen are all the same.
            unseen = operation.kind in ("set", "setnx") and operation.argument not in shown
            sort = (operation.kind, b"(unseen)" if unseen else operation.argument)
            unanswered[sort] = unanswered.get(sort, 0) + 1
        elif not is_answer:
            pending.add(number)
        else:
            before = states
            states = _answered(history, before, pending, unanswered, number)
            if not states:
                raise Violation(_report(history, before, operation))
            pending.discard(number)


def _answered(history, states, pending, unanswered, number):
    """The states in which this operation has taken effect, with its answer."""
    after, seen = set(), set()
    frontier = list(states)
    while frontier:
        value, taken, opened = frontier.pop()
        changes, idle = [], []
        for other in pending - taken:
            operation = history[other]
            new, result = apply(value, operation.kind, operation.argument)
            if result == operation.result:
                (idle if new == value else changes).append((new, other))
        # What changes nothing and answers as it should loses nothing by being first.
        taken |= {other for _, other in idle}
        state = (value, taken, opened)
        if state in seen:
            continue
        seen.add(state)
        if len(seen) > MAX_STATES:
            raise Violation(f"undecided: too many states at {history[number]}")
        if number in taken:
            after.add((value, taken - {number}, opened))
            continue
        frontier += [(new, taken | {other}, opened) for new, other in changes]
        counts = dict(opened)
        for sort, limit in unanswered.items():
            used = counts.get(sort, 0)
            new, _ = apply(value, *sort)
            if used < limit and new != value:
                frontier.append((new, taken, frozenset((counts | {sort: used + 1}).items())))
    return _best(after)


def _best(states):
    """Without those that another one of the same value reaches with fewer operations left open."""
    groups = {}
    for value, taken, opened in states:
        groups.setdefault((value, taken), []).append(dict(opened))
    best = set()
    for (value, taken), group in groups.items():
        kept = []
        for opened in sorted(group, key=lambda opened: sum(opened.values())):
            if not any(all(opened.get(s, 0) >= n for s, n in few.items()) for few in kept):
                kept.append(opened)
                best.add((value, taken, frozenset(opened.items())))
    return best


def _report(history, states, operation):
    values = sorted({repr(value) for value, _, _ in states})
    around = sorted(history, key=lambda one: one.called)
    at = around.index(operation)
    shown = "\n".join(
        f"{'>' if one is operation else ' '} {one}" for one in around[max(0, at - 25) : at + 10]
    )
    unknown = "\n".join(
        f"  {one}" for one in around if one.returned is None and one.called < operation.returned
    )
    return (
        f"not linearizable: {operation}\nbefore it the key was one of {', '.join(values[:20])}\n{shown}\n"
        f"without an answer by then:\n{unknown or '  none'}"
    )
