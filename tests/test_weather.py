"""Bad weather: every fault of faults.py once, under load, with what clients saw checked.

scripts/weather.sh does the same at random and for longer.
"""

import pytest

import cluster
import faults
import network

pytestmark = pytest.mark.skipif(cluster.ETCD is None, reason="apt-get install etcd-server")


@pytest.fixture(scope="module")
def weather(flux_binary, shared_folder):
    with shared_folder("weather") as folder, cluster.Cluster(folder, binary=flux_binary) as made:
        weather = faults.Weather(made)
        yield weather
        weather.check_all_again()


@pytest.fixture(scope="module")
def wires(flux_binary, shared_folder):
    if reason := network.available():
        pytest.skip(reason)
    with (
        network.Network(3) as made_network,
        shared_folder("wires") as folder,
        cluster.Cluster(folder, network=made_network, binary=flux_binary) as made,
    ):
        weather = faults.Weather(made)
        yield weather
        weather.check_all_again()


def strike(weather, fault):
    weather.cluster.wait_until_well()
    result = weather.strike(fault)
    print(f"\n{fault.__name__}: {result}")
    assert result["acknowledged"] > 50


@pytest.mark.parametrize("fault", faults.PROCESS_FAULTS, ids=lambda fault: fault.__name__)
def test_processes(weather, fault):
    strike(weather, fault)


@pytest.mark.parametrize("fault", faults.DISK_FAULTS, ids=lambda fault: fault.__name__)
def test_disks(weather, fault):
    if reason := faults.ThrottledDisk.available():
        pytest.skip(reason)
    strike(weather, fault)


@pytest.mark.parametrize("fault", faults.CLOCK_FAULTS, ids=lambda fault: fault.__name__)
def test_clocks(weather, fault):
    if reason := faults.FakeClock.available():
        pytest.skip(reason)
    strike(weather, fault)


@pytest.mark.parametrize("fault", faults.NETWORK_FAULTS, ids=lambda fault: fault.__name__)
def test_wires(wires, fault):
    strike(wires, fault)
