"""The embedded server's configuration, whatever the settings say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.server import server_config
from schemas.settings import MIB, NatsSettings

SETTINGS = [NatsSettings(), NatsSettings(replicas=3), NatsSettings(max_payload_bytes=MIB, max_file_store_bytes=MIB)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_message_is_on_disk_before_it_is_acknowledged(settings: NatsSettings) -> None:
    assert "\n  sync_interval: always\n" in _config(settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_store_has_a_bound(settings: NatsSettings) -> None:
    config = _config(settings)
    assert f"max_memory_store: {settings.max_memory_store_bytes}\n" in config
    assert f"max_file_store: {settings.max_file_store_bytes}\n" in config
    assert f"max_payload: {settings.max_payload_bytes}\n" in config


def test_it_listens_on_loopback_alone() -> None:
    assert 'listen: "127.0.0.1:-1"' in _config(NatsSettings())
    assert 'listen: "127.0.0.1:4711"' in _config(NatsSettings(), port=4711)


def test_a_server_may_buffer_two_of_the_largest_messages_for_a_client() -> None:
    """With less, the server would cut off a client that is sent one while it still reads another."""
    largest = 64 * MIB
    assert f"max_pending: {2 * largest}\n" in _config(NatsSettings(max_payload_bytes=largest))


def _config(settings: NatsSettings, *, port: int = -1) -> str:
    return server_config(settings, Path("/store"), port=port, password="secret")
