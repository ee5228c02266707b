"""Fixtures: a shared Flux node, a shared Redis, and a way to start nodes with settings of their own."""

import pytest

import servers


@pytest.fixture(scope="session")
def flux_binary():
    binary = servers.flux_binary()
    if not binary.exists():
        pytest.fail(f"{binary} does not exist: run `cargo build` first, or set FLUX_BIN")
    return binary


@pytest.fixture
def start_flux(flux_binary, tmp_path):
    """Starts nodes; `start_flux(fsync="no")` returns one that is ready. All are gone afterwards."""

    def start(mode="server", directory=None, **settings):
        node = servers.Flux(
            directory or tmp_path / f"node{len(start.nodes)}",
            mode=mode,
            binary=flux_binary,
            **settings,
        )
        start.nodes.append(node)
        return node.start()

    start.nodes = []
    yield start
    for node in start.nodes:
        node.kill()


@pytest.fixture(scope="session")
def shared_flux(flux_binary, tmp_path_factory):
    """One node with its gateway for tests that need no settings of their own."""
    node = servers.Flux(
        tmp_path_factory.mktemp("flux"), mode="up", binary=flux_binary, fsync="no"
    ).start()
    yield node
    code = node.stop()
    log = node.log()
    assert code == 0, f"exit code {code} on SIGTERM:\n{log[-8000:]}"
    assert "panicked" not in log, log[-8000:]


@pytest.fixture
def flux(shared_flux):
    """The shared node, empty."""
    assert shared_flux.running(), f"the shared node has ended:\n{shared_flux.log()[-8000:]}"
    with shared_flux.connect() as connection:
        connection.call("FLUSHALL")
    return shared_flux


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """The peer, or None where it is not installed."""
    if servers.REDIS_SERVER is None:
        yield None
        return
    server = servers.Redis(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Adds the logs of a failed test's nodes to its report."""
    outcome = yield
    report = outcome.get_result()
    if report.when != "call" or not report.failed:
        return
    fixtures = getattr(item, "funcargs", {})
    nodes = list(getattr(fixtures.get("start_flux"), "nodes", []))[-2:]
    if "flux" in fixtures:
        nodes.append(fixtures["flux"])
    for node in nodes:
        report.sections.append((f"log of {node.directory}", node.log()[-6000:]))
