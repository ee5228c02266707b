"""Settings that stop a start, and name themselves."""

import pytest

import servers


def refused(start_flux, **settings):
    with pytest.raises(servers.StartFailed) as failed:
        start_flux(**settings)
    assert failed.value.code not in (0, None)
    assert "panicked" not in failed.value.log, failed.value.log
    return failed.value.log


@pytest.mark.parametrize(
    "name, value",
    [
        ("fsync", "sometimes"),
        ("workers", "-1"),
        ("workers", "many"),
        ("partitions", "3"),
        ("max_memory", "lots"),
        ("segment_bytes", "0"),
        ("data_addr", "nowhere"),
        ("no_such_setting", "1"),
    ],
)
def test_bad_settings_stop_the_start(start_flux, name, value):
    log = refused(start_flux, **{name: value})
    assert name in log or name.upper() in log or name.replace("_", "-") in log, log


def test_a_listener_for_other_machines_needs_insecure(flux_binary, tmp_path):
    node = servers.Flux(tmp_path, binary=flux_binary)
    node.command = lambda: [
        part.replace(f"127.0.0.1:{node.admin_port}", f"0.0.0.0:{node.admin_port}")
        if isinstance(part, str) else part
        for part in servers.Flux.command(node)
    ]
    with pytest.raises(servers.StartFailed) as failed:
        node.start()
    assert "insecure" in failed.value.log and "admin" in failed.value.log


def test_other_number_of_partitions_is_refused(start_flux, tmp_path):
    node = start_flux(directory=tmp_path / "node", fsync="no", partitions=8)
    assert node.stop() == 0
    log = refused(start_flux, directory=tmp_path / "node", fsync="no", partitions=16)
    assert "partitions" in log, log


def test_an_address_in_use_is_refused(start_flux, flux_binary, tmp_path):
    taken = start_flux(fsync="no").port
    node = servers.Flux(tmp_path / "second", binary=flux_binary, fsync="no")
    node.port = taken
    with pytest.raises(servers.StartFailed) as failed:
        node.start()
    assert failed.value.code != 0
    assert str(taken) in failed.value.log, failed.value.log
