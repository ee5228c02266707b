"""Fixtures: a shared Flux node, a shared Redis, and a way to start nodes with settings of their own."""

import contextlib
import shutil

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


@pytest.fixture(scope="module")
def shared_folder(request, tmp_path_factory):
    """A context that gives a directory for what all tests of a module use. As with `tmp_path` it stays
    where something failed, and is gone otherwise: a cluster's files are hundreds of megabytes."""

    @contextlib.contextmanager
    def folder(name):
        failed = request.session.testsfailed
        made = tmp_path_factory.mktemp(name)
        yield made
        if request.session.testsfailed == failed:
            shutil.rmtree(made)

    return folder


@pytest.fixture(scope="session")
def shared_flux(flux_binary, tmp_path_factory):
    """A function that returns the one node, with its gateway, for tests without settings of their own.

    A node that has ended by itself fails the test that notices it; the next one gets a new node.
    """
    nodes = []

    def current():
        if nodes and not nodes[-1].running():
            node = nodes.pop()
            pytest.fail(f"the shared node ended with {node.wait()}:\n{node.log()[-6000:]}")
        if not nodes:
            directory = tmp_path_factory.mktemp("flux")
            nodes.append(servers.Flux(directory, "up", binary=flux_binary, fsync="no").start())
        return nodes[-1]

    yield current
    for node in nodes:
        code = node.stop()
        assert code == 0, f"exit code {code} on SIGTERM:\n{node.log()[-6000:]}"
        assert "panicked" not in node.log(), node.log()[-6000:]


@pytest.fixture
def flux(shared_flux):
    """The shared node, empty."""
    node = shared_flux()
    with node.connect() as connection:
        connection.call("FLUSHALL")
    return node


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
