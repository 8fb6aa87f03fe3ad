from __future__ import annotations

import stat
from pathlib import Path

import pytest

from schemas.errors import SetupError
from schemas.local import READY_FILE, Ready, home_folder, nats_url, read_ready, write_private, write_ready

READY = Ready(
    base_url="http://127.0.0.1:8000/v1",
    api_key="sk-1",
    admin_key="sk-2",
    ledger_url="http://127.0.0.1:1",
    nats_url="nats://127.0.0.1:2",
    home="/home",
    pids={"ingress": 1, "worker": 2},
)


def test_the_home_folder_is_as_given_then_as_in_the_environment_then_the_systems(tmp_path: Path) -> None:
    environ = {"PENSTOCK_HOME": str(tmp_path / "environ")}
    assert home_folder(str(tmp_path / "given"), environ) == tmp_path / "given"
    assert home_folder(None, environ) == tmp_path / "environ"
    assert home_folder(None, {}).name == "penstock"
    assert home_folder("relative", {}).is_absolute()


def test_what_runs_is_found_by_its_home(tmp_path: Path) -> None:
    write_ready(tmp_path / READY_FILE, READY)
    assert read_ready(tmp_path) == READY


def test_a_file_with_keys_is_for_its_owner_alone(tmp_path: Path) -> None:
    """Also where a file that others could read was there before."""
    path = tmp_path / "new" / "ready.json"
    write_ready(path, READY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    write_ready(path, READY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_private_file_is_replaced_in_one_step_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_private(path, b"one")
    with path.open("rb") as reader:
        write_private(path, b"two")
        assert reader.read() == b"one"
    assert path.read_bytes() == b"two"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_home_where_nothing_runs_says_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"nothing is running in .*`penstock up`"):
        read_ready(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json"])
def test_a_ready_file_of_another_make_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / READY_FILE).write_bytes(content)
    with pytest.raises(SetupError, match=r"ready\.json is not what"):
        read_ready(tmp_path)


def test_a_worker_works_for_whom_it_is_told_to_or_for_what_runs_in_the_home(tmp_path: Path) -> None:
    write_ready(tmp_path / READY_FILE, READY)
    assert nats_url("nats://elsewhere", str(tmp_path)) == "nats://elsewhere"
    assert nats_url(None, str(tmp_path)) == READY.nats_url
    with pytest.raises(SetupError, match=r"nothing is running in .*empty.*--nats URL, or PENSTOCK_NATS"):
        nats_url(None, str(tmp_path / "empty"))
    (tmp_path / READY_FILE).write_bytes(b"{")
    with pytest.raises(SetupError, match="is not what `penstock up` writes"):
        nats_url(None, str(tmp_path))
