"""What `penstock up` leaves for the other commands on the same machine: its home folder and what is running in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import platformdirs
from msgspec import Struct

from schemas.errors import SetupError

READY_FILE = "ready.json"


class Ready(Struct, frozen=True, kw_only=True):
    """A running `penstock up`. Holds keys: the file is for its owner's eyes only (mode 0600)."""

    base_url: str  # ends in /v1
    api_key: str
    admin_key: str
    ledger_url: str
    nats_url: str  # with its credential
    home: str
    pids: dict[str, int]  # by role


def home_folder(given: str | None, environ: Mapping[str, str] | None = None) -> Path:
    """The home folder: *given*, else PENSTOCK_HOME, else where this system keeps a user's data."""
    environ = os.environ if environ is None else environ
    return Path(given or environ.get("PENSTOCK_HOME") or platformdirs.user_data_dir("penstock")).absolute()


def write_private(path: Path, content: bytes) -> None:
    """Writes *path* in one step, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    draft.replace(path)


def write_ready(path: Path, ready: Ready) -> None:
    write_private(path, msgspec.json.format(msgspec.json.encode(ready), indent=2) + b"\n")


def read_ready(home: Path) -> Ready:
    """What runs in *home*.

    Raises: SetupError if nothing was started there.
    """
    path = home / READY_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ready)
    except OSError as error:
        raise SetupError(
            f"nothing is running in {home}. Start it with `penstock up`, or name its folder with --home or PENSTOCK_HOME."
        ) from error
    except msgspec.MsgspecError as error:
        raise SetupError(f"{path} is not what `penstock up` writes: {error}") from error


def nats_url(given: str | None, home: str | None) -> str:
    """Which NATS a worker works for: *given*, else that of the `penstock up` that runs in *home*.

    Raises: SetupError if there is neither.
    """
    if given:
        return given
    try:
        return read_ready(home_folder(home)).nats_url
    except SetupError as error:
        raise SetupError(
            f"{error.message.rstrip('.')}. To work for another machine's: --nats URL, or PENSTOCK_NATS."
        ) from error
