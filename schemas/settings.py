"""Every setting and its default, and the only reader of files and environment.

penstock.toml, then ``PENSTOCK_<SECTION>_<NAME>`` from the environment, then flags: merged raw, converted once, passed down.
Unknown names are errors, so that a typing mistake can't pass for a setting.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from schemas.errors import SetupError
from schemas.ids import RouteId
from schemas.jobs import TimeLimits, Timeouts
from schemas.money import UNKNOWN, Price, micro_per_million
from schemas.routing import Order, check_order

MIB = 1024 * 1024
SLOTS_DEFAULT = 64  # of a route
OWN = frozenset({"echo", "vllm"})  # providers that run here and charge nothing


LOCAL_ADDRESSES = (  # where model servers listen unless they are told otherwise
    "127.0.0.1:11434",  # Ollama
    "127.0.0.1:1234",  # LM Studio
    "127.0.0.1:8080",  # llama.cpp
    "127.0.0.1:8000",  # vLLM
)


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class NatsSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Streams and the embedded server. *replicas* is 1 for a single server and 3 for a cluster."""

    replicas: int = 1
    max_memory_store_bytes: int = 1024 * MIB
    max_file_store_bytes: int = 20 * 1024 * MIB
    max_payload_bytes: int = 8 * MIB  # NATS advises against more
    jobs_max_bytes: int = 512 * MIB
    backlog_per_org: int = 1024  # jobs of one (model, route, lane, org) that may wait
    events_max_age_s: int = 30 * 24 * 3600


class TimeoutsMax(Timeouts, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request may ask for at most."""

    queue_s: float = 600.0
    first_token_s: float = 1800.0
    idle_s: float = 600.0
    total_s: float = 14_400.0


STOP_EXTRA_S = 12.0  # for a role to stop in, besides the time that what runs has for its end


class IngressSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 7 * MIB  # a job must fit into max_payload_bytes
    body_timeout_s: float = 30.0
    max_header_bytes: int = 64 * 1024
    header_timeout_s: float = 30.0
    max_concurrent_requests: int = 4096
    max_held_bytes: int = 512 * MIB  # bodies of all requests under way
    max_connections: int = 8192
    keep_alive_comment_s: float = 15.0
    max_buffered_bytes: int = 8 * MIB  # frames of one stream that its client has not read yet
    drain_s: float = 30.0
    resume_s: float = (
        60.0  # a stream can be read on for so long after its end; so long may a request go on without its client
    )
    idempotency_s: float = 3600.0  # an answer with an Idempotency-Key is replayed for so long
    max_kept_bytes: int = 128 * MIB  # of answers that may be read again, in memory
    max_kept_answer_bytes: int = 8 * MIB  # of one of them
    max_kept_answers: int = 16384
    hedge: bool = False  # a second attempt beside one that says nothing
    hedge_after_s: float = 2.0  # of a route that has not answered often enough for its own figure
    timeouts: Timeouts = Timeouts()  # where neither the request nor its key nor the route says another
    timeouts_max: TimeoutsMax = TimeoutsMax()

    @property
    def stop_wait_s(self) -> float:
        """How long its process may take to stop."""
        return self.drain_s + STOP_EXTRA_S


class RoutingSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In which order an ingress tries the routes of a model, and how long it leaves one alone after a fault."""

    strategy: Order = "ordered"
    models: dict[str, Order] = {}  # a model's own strategy
    cooldown_s: float = 1.0  # the first time; each further one is twice as long
    cooldown_max_s: float = 60.0


class WorkerSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    drain_s: float = 30.0  # for what runs to finish, and again to be handed back
    connect_timeout_s: float = 10.0
    first_byte_timeout_s: float = 300.0
    idle_timeout_s: float = 120.0
    tries: int = 3  # of one attempt at a provider that answers 5xx or can't be reached
    limits_shared_by: int = 1  # so many workers have the same keys: each keeps to its part of what routes state
    limit_wait_s: float = 5.0  # an attempt waits so long for a key or a limit that has no room
    max_kept_bytes: int = 8 * MIB  # frames of one attempt kept for a resend
    max_response_bytes: int = 64 * MIB  # a provider's answer without streaming
    max_event_bytes: int = 8 * MIB  # one event of a provider's stream
    run_folder: str | None = (
        None  # sockets and logs of engines; None: a folder of their own, which the system may sweep
    )
    discover: bool | None = None  # look for model servers on this machine; default: where no route is configured
    discover_addresses: tuple[str, ...] = LOCAL_ADDRESSES

    @property
    def stop_wait_s(self) -> float:
        """How long its process may take to stop."""
        return 2 * self.drain_s + STOP_EXTRA_S


class LedgerSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 0  # any free one
    batch_pages: int = 2000
    sql_timeout_s: float = 30.0
    sql_max_rows: int = 100_000
    sql_memory_mib: int = 256
    sql_threads: int = 2
    sql_max_concurrent: int = 4
    sql_max_result_bytes: int = 64 * MIB
    ingress_silence_s: float = 15.0  # of an ingress, until it is taken for dead
    receipt_wait_s: float = 10.0  # from then on for the receipts of its requests, until these are closed


class UpSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ingresses: int = 1  # ingress processes; they share the port
    workers: int = 1  # worker processes; each serves every configured route


class ModelSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    upstream: str | None = None  # what the provider calls it; default: the same
    price: Price | None = None  # written in US dollars per million tokens, kept exact; None: see `priced`

    @property
    def upstream_name(self) -> str:
        return self.upstream or self.name

    @property
    def charged(self) -> Price:
        return UNKNOWN if self.price is None else self.price


class VllmSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A route with ``provider = "vllm"``. With ``base_url`` in the route that server is used; without, one is started."""

    model: str | None = (
        None  # what is served: a Hugging Face name or a folder; default: the route's first model upstream
    )
    command: tuple[str, ...] = ("vllm",)
    args: tuple[str, ...] = ()  # any further flags of `vllm serve`
    environ: dict[str, str] = {}
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES; several are used together (tensor parallel)
    start_timeout_s: float = 1800.0  # the first start may have to download the weights
    idle_unload_s: float = 0.0  # unload the model when no job came for so long; 0: never


class RouteSettings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A place that jobs can be sent to. *api_keys* are references: ``env:NAME`` or ``file:PATH``."""

    id: RouteId
    provider: str
    base_url: str | None = None
    api_keys: tuple[str, ...] = ()
    headers: dict[str, str] = {}  # sent with every request, beside the key
    max_concurrency: int | None = None  # attempts at once; None: what the provider says, else `SLOTS_DEFAULT`
    requests_per_minute: int = 0  # 0: no limit but what the provider tells
    tokens_per_minute: int = 0  # the same for tokens of prompts and answers; also for the strategy `usage_based`
    first_token_max_s: float = 0.0  # streams that typically begin later take the route down; 0: never
    models: tuple[ModelSettings, ...] = ()  # none: all that the provider says it has
    tokens_per_s: float = 0.0  # echo: its pace for each stream; 0 is as fast as it can
    delay_ms: float = 0.0  # echo: before its first token
    own: bool | None = None  # it runs on machines of ours; None: vllm, echo, and what is on this machine
    weight: int = 1  # its part of what the strategy `weighted` spreads
    parameters: tuple[str, ...] | None = None  # of a request that it honours, for `require_parameters`; None: not known
    vllm: VllmSettings = VllmSettings()
    timeouts: TimeLimits = TimeLimits()

    @property
    def slots(self) -> int:
        """Attempts at once, where the provider itself doesn't know better."""
        return SLOTS_DEFAULT if self.max_concurrency is None else self.max_concurrency


class Settings(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    home: str | None = None
    nats: NatsSettings = NatsSettings()
    ingress: IngressSettings = IngressSettings()
    routing: RoutingSettings = RoutingSettings()
    worker: WorkerSettings = WorkerSettings()
    ledger: LedgerSettings = LedgerSettings()
    up: UpSettings = UpSettings()
    routes: tuple[RouteSettings, ...] = ()


SECTIONS = ("nats", "ingress", "routing", "worker", "ledger", "up")


def load(config: Path | None, environ: Mapping[str, str] | None = None, **flags: Mapping[str, Any]) -> Settings:
    """The settings from the file *config* (none: defaults), *environ* and *flags* (``ingress={"port": 0}``), later ones winning.

    Raises: SetupError that names the file and the setting.
    """
    raw: dict[str, Any] = {}
    if config is not None:
        raw = _from_file(config)
    for section, values in _from_environ(os.environ if environ is None else environ).items():
        _merge(raw, section, values)
    for section, flag_values in flags.items():
        _merge(raw, section, {name: value for name, value in flag_values.items() if value is not None})
    try:
        _price_micro(raw)
        _refuse_unknown(_table(raw, "ingress").get("timeouts"), Timeouts, "a time-out")
        for route in _tables(raw, "routes"):
            _refuse_unknown(route.get("timeouts"), TimeLimits, "a time-out")
        settings = msgspec.convert(raw, Settings, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise SetupError(f"{config or 'settings'}: {error}") from error
    _check(settings, config)
    return settings


def discovers(settings: Settings) -> bool:
    """Whether a worker looks for model servers on its machine."""
    return not settings.routes if settings.worker.discover is None else settings.worker.discover


def secret(reference: str, environ: Mapping[str, str] | None = None) -> str:
    """The secret behind ``env:NAME`` or ``file:PATH``.

    Raises: SetupError if there is none; its message never holds the secret.
    """
    scheme, _, place = reference.partition(":")
    if scheme == "env":
        value = (os.environ if environ is None else environ).get(place, "")
    elif scheme == "file":
        try:
            value = Path(place).read_text(encoding="utf-8")
        except OSError as error:
            raise SetupError(f"the secret file {place} can't be read: {error.strerror}") from error
    else:
        raise SetupError("a secret is written as env:NAME or file:PATH, never as itself")
    if not value.strip():
        raise SetupError(f"the secret {reference} is empty or not set")
    return value.strip()


def _from_file(config: Path) -> dict[str, Any]:
    try:
        with config.open("rb") as file:
            return tomllib.load(file, parse_float=Decimal)
    except OSError as error:
        raise SetupError(f"{config} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"{config} is not TOML: {error}") from error


NO_SETTINGS = frozenset({"PENSTOCK_LEDGER_URL"})  # where the commands find the ledger


def _from_environ(environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """``PENSTOCK_INGRESS_MAX_BODY_BYTES=1`` is ``{"ingress": {"max_body_bytes": "1"}}``."""
    found: dict[str, dict[str, str]] = {}
    for section in SECTIONS:
        prefix = f"PENSTOCK_{section.upper()}_"
        values = {
            k.removeprefix(prefix).lower(): v
            for k, v in environ.items()
            if k.startswith(prefix) and k not in NO_SETTINGS
        }
        if values:
            found[section] = values
    return found


def _merge(raw: dict[str, Any], section: str, values: Mapping[str, Any]) -> None:
    if isinstance(raw.setdefault(section, {}), dict):  # else what is wrong is said when it is converted
        raw[section] = {**raw[section], **values}


def _price_micro(raw: dict[str, Any]) -> None:
    """Prices as people write them become whole micro-dollars, in place. Raises: ValueError."""
    for route in _tables(raw, "routes"):
        for model in _tables(route, "models"):
            if isinstance(price := model.get("price"), dict):
                _refuse_unknown(price, Price, "a price")
                model["price"] = {name: _dollars(name, value) for name, value in price.items()}


def _dollars(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Decimal | int | str):
        raise ValueError(f"the price {name!r} must be a number of dollars per million tokens")  # noqa: TRY004
    return micro_per_million(value)


def _refuse_unknown(table: object, struct: type[Struct], what: str) -> None:
    """For the Structs that travel, which ignore what they don't know. Raises: ValueError."""
    known = [field.name for field in msgspec.structs.fields(struct) if field.name != "unknown"]
    for name in table if isinstance(table, dict) else ():
        if name not in known:
            raise ValueError(f"{name!r} is not {what}; there are {', '.join(known)}")


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def _tables(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = raw.get(name)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _check(settings: Settings, config: Path | None) -> None:
    for timeouts in (settings.ingress.timeouts, settings.ingress.timeouts_max, *(r.timeouts for r in settings.routes)):
        for name, seconds in msgspec.structs.asdict(timeouts).items():
            if seconds is not None and not seconds > 0:
                raise SetupError(f"{config or 'settings'}: the time-out {name} must be above 0")
    ids = [route.id for route in settings.routes]
    for doubled in {i for i in ids if ids.count(i) > 1}:
        raise SetupError(f"{config}: two routes have the id {doubled!r}")
    for route in settings.routes:
        _check_route(route, config)
    _check_routing(settings, config)
    if settings.worker.limits_shared_by < 1:
        raise SetupError(f"{config or 'settings'}: worker.limits_shared_by must be at least 1")
    for address in settings.worker.discover_addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise SetupError(f"{config}: discover_addresses: {address!r} is no host:port")


def _check_route(route: RouteSettings, config: Path | None) -> None:
    where = f"{config}: route {route.id!r}"
    for header in route.headers.items():
        if not all(text.isascii() and text.isprintable() for text in header) or not header[0]:
            raise SetupError(f"{where}: no header can be {header[0]!r} with that value")
    if not 0 < route.slots <= 100_000:
        raise SetupError(f"{where}: max_concurrency must be 1 to 100000")
    if min(route.requests_per_minute, route.tokens_per_minute, route.first_token_max_s) < 0:
        raise SetupError(f"{where}: a limit can't be negative")
    if route.provider in OWN and (route.requests_per_minute or route.first_token_max_s):
        raise SetupError(
            f"{where}: requests_per_minute and first_token_max_s are for providers, not for what runs here"
        )


def _check_routing(settings: Settings, config: Path | None) -> None:
    for route in settings.routes:
        if not 0 <= route.weight <= 1_000_000:
            raise SetupError(f"{config}: route {route.id!r}: weight must be 0 to 1000000")
    try:
        for order in (settings.routing.strategy, *settings.routing.models.values()):
            check_order(order)
    except ValueError as error:
        raise SetupError(f"{config or 'settings'}: routing: {error}") from error
    if not 0 < settings.routing.cooldown_s <= settings.routing.cooldown_max_s:
        raise SetupError(f"{config or 'settings'}: routing.cooldown_s must be above 0 and at most cooldown_max_s")
