"""Every golden script, against Flux-KV and against the real Redis that it was recorded from."""

import pytest

from golden import script

SCRIPTS = script.scripts()


def parameters(flux_only_too):
    for one in SCRIPTS:
        if one.flux_only and not flux_only_too:
            continue
        for case in one.cases:
            for version in case.versions:
                yield pytest.param(
                    one, case, version, id=f"{one.path.stem}-{case.name}-resp{version}"
                )


def check(port, one, case, version):
    with script.Runner(port, version) as runner:
        for step in case.steps:
            raw = runner.run(step)
            if step.kind != "command":
                continue
            expected = step.expected_lines(version)
            assert script.matches(expected, raw, step.unordered), (
                f"{one.path.name}:{step.line}: {step.source[0]}\n"
                f"expected {expected}\n"
                f"     got {script.lines_of(raw)}"
            )


@pytest.mark.parametrize("one, case, version", list(parameters(flux_only_too=True)))
def test_flux(flux, one, case, version):
    check(flux.port, one, case, version)


@pytest.mark.parametrize("one, case, version", list(parameters(flux_only_too=False)))
def test_redis(redis_server, one, case, version):
    if redis_server is None:
        pytest.skip("redis-server is not installed")
    with redis_server.connect() as connection:
        info = connection.call("INFO", "server").decode()
    if "redis_version:7.0." not in info:
        pytest.skip("the scripts are recorded from Redis 7.0")
    check(redis_server.port, one, case, version)
