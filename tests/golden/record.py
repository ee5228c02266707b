#!/usr/bin/env python3
"""Writes the replies of a real Redis 7.0 into the golden scripts.

    tests/golden/record.py [strings.txt cluster/commands.txt …]

A reply that already matches, placeholders included, stays as it is; the others are replaced. Files for
Flux-KV alone are left alone: no Redis can answer them.
"""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import servers
from golden import script


def main():
    names = sys.argv[1:]
    chosen = lambda scripts: [
        s
        for s in scripts
        if not s.flux_only and (not names or str(s.path.relative_to(script.FOLDER)) in names)
    ]
    record_all(chosen(script.scripts()), lambda directory: servers.Redis(directory).start())
    record_all(chosen(script.cluster_scripts()), script.start_cluster_redis)


def record_all(chosen, start):
    if not chosen:
        return
    with tempfile.TemporaryDirectory() as directory:
        redis = start(directory)
        try:
            for one in chosen:
                record(one, redis.port)
        finally:
            redis.stop()


def record(one, port):
    changed = 0
    for case in one.cases:
        for version in case.versions:
            with script.Runner(port, version) as runner:
                for step in case.steps:
                    raw = runner.run(step)
                    if step.kind != "command":
                        continue
                    expected = step.expected_lines(version)
                    if expected and script.matches(expected, raw, step.unordered):
                        continue
                    step.expected[version] = script.lines_of(raw)
                    changed += 1
        if case.versions == (3,):
            for step in case.steps:
                if 3 in step.expected:
                    step.expected = {2: step.expected[3]}
    one.path.write_text("\n".join(render(one)) + "\n")
    print(f"{one.path.name}: {len(one.cases)} cases, {changed} replies changed")


def render(one):
    for item in one.items:
        if isinstance(item, str):
            yield item
            continue
        yield from item.source
        second, third = item.expected.get(2, []), item.expected.get(3)
        for line in second:
            yield f"< {line}".rstrip()
        if third is not None and third != second:
            for line in third:
                yield f"<3 {line}".rstrip()


if __name__ == "__main__":
    main()
