from __future__ import annotations

from pathlib import Path

from workers.engine.log_file import LogFile


def test_a_log_and_the_one_before_it_are_all_that_is_kept(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "e.log", max_bytes=1000)
    for number in range(100):
        log.write(f"{number:099}\n".encode())
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"e.log", "e.old"}
    assert max(sizes.values()) <= 1000
    assert log.tail()[-1] == f"{99:099}"


def test_one_piece_longer_than_the_bound_is_cut(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "e.log", max_bytes=10)
    log.write(b"x" * 100 + b"end")
    assert (tmp_path / "e.log").read_bytes() == b"xxxxxxxend"


def test_a_log_that_was_there_counts(tmp_path: Path) -> None:
    (tmp_path / "e.log").write_bytes(b"x" * 990)
    LogFile(tmp_path / "e.log", max_bytes=1000).write(b"y" * 20)
    assert (tmp_path / "e.log").stat().st_size == 20


def test_a_log_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "no folder" / "e.log")
    log.write(b"a\nb\n")
    assert log.tail() == ["a", "b"]
