"""The checker of histories finds what is wrong in them, and nothing in those that are right."""

import random

import pytest

from linearizability import Operation, Violation, apply, check


def history(*lines):
    """Operations from `called returned kind argument result`, where returned may be `-`."""
    operations = []
    for number, line in enumerate(lines):
        called, returned, kind, argument, result = line.split()
        known = {"OK": b"OK", "nil": None}
        if kind == "incr":
            known = {result: None if result == "?" else int(result)}
        operations.append(
            Operation(
                client=f"c{number}",
                key=b"k",
                kind=kind,
                argument=None if argument == "-" else argument.encode(),
                called=float(called),
                returned=None if returned == "-" else float(returned),
                result=known.get(result, result.encode()),
            )
        )
    return operations


RIGHT = {
    "in turn": ["1 2 set a OK", "3 4 get - a", "5 6 getdel - a", "7 8 get - nil"],
    "overlapping writes in the order that readers saw": [
        "1 9 set a OK", "1 9 set b OK", "10 11 get - a",
    ],
    "an unknown write that shows late": ["1 - set a ?", "2 3 get - nil", "4 5 get - a"],
    "an unknown write that never shows": ["1 - set a ?", "2 3 get - nil", "4 5 get - nil"],
    "a read in the middle of a write": ["1 9 set a OK", "2 3 get - nil", "4 5 get - a"],
    "a counter with unknown increments": [
        "1 2 incr - 1", "3 - incr - ?", "3 - incr - ?", "4 5 incr - 3", "6 7 incr - 4",
    ],
    "a refused conditional write": ["1 2 set a OK", "3 4 setnx b nil", "5 6 get - a"],
}

WRONG = {
    "a lost write": ["1 2 set a OK", "3 4 get - nil"],
    "a stale read": ["1 2 set a OK", "3 4 set b OK", "5 6 get - a"],
    "a value that nobody wrote": ["1 2 set a OK", "3 4 get - z"],
    "reads that go back": ["1 9 set a OK", "2 3 get - a", "4 5 get - nil"],
    "a write that took effect twice": ["1 2 incr - 1", "3 4 incr - 3"],
    "an unknown write that took effect twice": [
        "1 - incr - ?", "2 3 get - 1", "4 5 incr - 3",
    ],
    "a value taken twice": ["1 2 set a OK", "3 9 getdel - a", "3 9 getdel - a"],
    "two winners": ["1 9 setnx a OK", "1 9 setnx b OK"],
    "an unknown write before its call": ["1 2 get - a", "3 - set a ?"],
    "a write lost after it was read": ["1 - set a ?", "2 3 get - a", "4 5 get - nil"],
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    assert check(history(*RIGHT[name])) == 1


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    with pytest.raises(Violation, match="not linearizable"):
        check(history(*WRONG[name]))


def random_history(chance, count):
    """Operations on one copy at a random moment between call and answer; some answers are lost."""
    kinds = ["set", "get", "setnx", "getdel"]
    calls = []
    for number in range(count):
        called = number / 4 + chance.random()
        calls.append((called + chance.random(), called, chance.choice(kinds), number))
    state, operations = None, []
    for effect, called, kind, number in sorted(calls):
        argument = b"%d" % number if kind in ("set", "setnx") else None
        lost, happens = chance.random() < 0.02, chance.random() < 0.5
        result = None
        if happens or not lost:
            state, result = apply(state, kind, argument)
        returned = None if lost else effect + chance.random()
        operations.append(
            Operation(f"c{number}", b"k", kind, argument, called, returned, None if lost else result)
        )
    return operations


@pytest.mark.parametrize("seed", range(20))
def test_random_histories(seed):
    """What one copy gives is right; a read of an older value, put in anywhere, is found."""
    chance = random.Random(seed)
    operations = random_history(chance, 300)
    check(operations)
    reads = [o for o in operations if o.kind == "get" and o.result is not None and 20 < o.called < 45]
    read = chance.choice(reads)
    operations.append(
        Operation("late", b"k", "get", None, read.called + 20, read.returned + 20, read.result)
    )
    with pytest.raises(Violation):
        check(operations)
