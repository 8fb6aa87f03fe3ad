"""The bytes that hashes are taken over and that other versions read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from schemas import codec
from schemas.frames import Delta, Faulted, Finished, Frame, Started, Yielded
from schemas.ids import IngressId, KeyId, Nonce, OrgId, RequestId, RouteId, WorkerId
from schemas.jobs import (
    Announce,
    Cancel,
    Command,
    Job,
    ModelOffer,
    Presence,
    Resend,
    RouteOffer,
    Timeouts,
    WorkerState,
)
from schemas.money import Price, Usage

HEAD: dict[str, Any] = {"request_id": RequestId("r"), "epoch": 1, "seq": 2}

FRAMES = [
    (Started(**HEAD, worker=WorkerId("w")), b'{"t":"started","request_id":"r","epoch":1,"seq":2,"worker":"w"}'),
    (
        Delta(**HEAD, chunks=(msgspec.Raw(b'{"choices": [1]}'),), tokens=1),
        b'{"t":"delta","request_id":"r","epoch":1,"seq":2,"chunks":[{"choices": [1]}],"tokens":1}',
    ),
    (
        Finished(**HEAD, usage=Usage(prompt_tokens=3), finish_reason="stop"),
        b'{"t":"finished","request_id":"r","epoch":1,"seq":2,"usage":{"prompt_tokens":3},"finish_reason":"stop"}',
    ),
    (
        Faulted(**HEAD, code="upstream_error", message="m", status=500),
        b'{"t":"faulted","request_id":"r","epoch":1,"seq":2,"code":"upstream_error","message":"m","status":500}',
    ),
    (Yielded(**HEAD, reason="drain"), b'{"t":"yielded","request_id":"r","epoch":1,"seq":2,"reason":"drain"}'),
]

COMMANDS = [
    (Cancel(nonce=Nonce("n")), b'{"t":"cancel","nonce":"n","reason":"client_left"}'),
    (Resend(nonce=Nonce("n"), seq=7), b'{"t":"resend","nonce":"n","seq":7}'),
    (Announce(), b'{"t":"announce"}'),
]

JOB = Job(
    request_id=RequestId("r"),
    epoch=1,
    ingress=IngressId("i"),
    nonce=Nonce("n"),
    org=OrgId("o"),
    key_id=KeyId("k"),
    model="m",
    route=RouteId("e"),
    stream=True,
    accepted_ns=5,
    timeouts=Timeouts(),
    body=msgspec.Raw(b'{"model":  "m", "x": [1.0, 1e2]}'),
)

PRESENCE = Presence(
    worker=WorkerId("w"),
    state=WorkerState.DRAINING,
    routes=(
        RouteOffer(
            route=RouteId("e"),
            provider="echo",
            models=(ModelOffer(name="m", price=Price(input=1)),),
            slots=4,
            free=3,
        ),
    ),
    reason="sigterm",
)


@pytest.mark.parametrize(("frame", "wire"), FRAMES, ids=lambda side: type(side).__name__)
def test_a_frame_is_these_bytes(frame: Frame, wire: bytes) -> None:
    assert codec.encode(frame) == wire
    assert type(codec.decode_frame(wire)) is type(frame)
    assert codec.encode(codec.decode_frame(wire)) == wire


@pytest.mark.parametrize(("command", "wire"), COMMANDS, ids=lambda side: type(side).__name__)
def test_a_command_is_these_bytes(command: Command, wire: bytes) -> None:
    assert codec.encode(command) == wire
    assert codec.decode_command(wire) == command


def test_a_job_carries_the_clients_body_untouched() -> None:
    decoded = codec.decode_job(codec.encode(JOB))
    assert bytes(decoded.body) == b'{"model":  "m", "x": [1.0, 1e2]}'
    assert codec.encode(decoded) == codec.encode(JOB)
    assert decoded.timeouts == JOB.timeouts


def test_presence_comes_back_as_it_was_said() -> None:
    assert codec.decode_presence(codec.encode(PRESENCE)) == PRESENCE


def test_the_keys_of_mappings_are_sorted_so_that_equal_values_are_equal_bytes() -> None:
    assert codec.encode({"b": 1, "a": {"z": 1, "y": 2}}) == b'{"a":{"y":2,"z":1},"b":1}'


@pytest.mark.parametrize(
    ("decode", "wire"),
    [
        (codec.decode_frame, FRAMES[0][1]),
        (codec.decode_command, COMMANDS[0][1]),
        (codec.decode_job, codec.encode(JOB)),
        (codec.decode_presence, codec.encode(PRESENCE)),
    ],
)
def test_a_field_of_a_newer_version_is_ignored(decode: Any, wire: bytes) -> None:
    newer = wire[:-1] + b',"of_a_newer_version":{"a":[1]}}'
    assert codec.encode(decode(newer)) == codec.encode(decode(wire))


@pytest.mark.parametrize(
    "wire", [b"", b"{}", b'{"t":"unheard"}', b'{"t":"started"}', b"[]", b'{"t":"cancel","nonce":"n"}']
)
def test_what_is_not_a_frame_is_refused(wire: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        codec.decode_frame(wire)
