"""compose.yaml, the Dockerfile and deploy/ against the code: no command, option, variable, port or path in them is made up.

There may be no Docker where the tests run, so these check everything that Docker itself would not.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import penstock
from bus.server import find_binary, server_config
from ingress import process as ingress_process
from ingress.app import build_app
from ingress.bootstrap import GIVEN_KEYS, given_keys
from schemas.routes import with_builtin_routes
from schemas.settings import MIB, STOP_EXTRA_S, NatsSettings, load
from workers import worker

ROOT = Path(__file__).parents[2]
ROLES = {"ingress": ["ingress-1", "ingress-2"], "worker": ["worker"], "ledger": ["ledger"]}
SERVERS = ["nats-1", "nats-2", "nats-3"]
PASSWORDS = {"NATS_PASSWORD": "1e5", "NATS_CLUSTER_PASSWORD": "0x1f"}  # text that must not be taken for numbers
OTHER_VARIABLES = {"PENSTOCK_NATS", "PENSTOCK_HOME"} | {f"{name}_FILE" for name, _ in GIVEN_KEYS}

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [(role, name) for role, names in ROLES.items() for name in names]


def environment(service: str) -> dict[str, str]:
    """The variables of *service* with the passwords put in, as compose does it from .env."""
    return {name: interpolated(value) for name, value in SERVICES[service]["environment"].items()}


def interpolated(value: str) -> str:
    return re.sub(r"\$\{(\w+)(?::\?[^}]*)?\}", lambda match: PASSWORDS[match[1]], value)


def settings_of(service: str) -> Any:
    return load(ROOT / "deploy" / "penstock.toml", environment(service))


def command(role: str) -> click.Command:
    found = penstock.cli.get_command(click.Context(penstock.cli), role)
    assert found is not None, f"there is no `penstock {role}`"
    return found


def published(service: str) -> dict[int, int]:
    """Host port -> container port."""
    parts = [port.split(":") for port in SERVICES[service].get("ports", [])]
    assert all(host == "127.0.0.1" for host, _, _ in parts), "without TLS nothing is published beyond this machine"
    return {int(outer): int(inner) for _, outer, inner in parts}


def test_compose_has_three_servers_two_ingresses_two_workers_and_one_ledger() -> None:
    assert sorted(SERVICES) == sorted([*SERVERS, *(name for _, name in OURS)])
    assert SERVICES["worker"]["deploy"]["replicas"] == 2
    assert "deploy" not in SERVICES["ledger"]


@pytest.mark.parametrize(("role", "service"), OURS)
def test_every_command_is_one_that_penstock_takes(role: str, service: str) -> None:
    name, *arguments = SERVICES[service]["command"]
    assert name == role
    needed = {p.opts[0]: p.envvar for p in command(role).params if p.required and isinstance(p, click.Option)}
    assert set(needed.values()) <= environment(service).keys()
    from_environment = [word for option in needed for word in (option, "given")]
    command(role).make_context(name, [*arguments, *from_environment])  # raises for an option that there isn't


@pytest.mark.parametrize(("role", "service"), OURS)
def test_every_variable_is_read_by_the_code(role: str, service: str) -> None:
    settings_of(service)  # raises for a setting that there isn't
    unread = {
        name
        for name in SERVICES[service]["environment"]
        if name not in OTHER_VARIABLES and not re.match(r"PENSTOCK_(NATS|INGRESS|WORKER|LEDGER)_", name)
    }
    assert not unread


def test_the_workers_share_the_limits_of_a_route() -> None:
    assert settings_of("worker").worker.limits_shared_by == SERVICES["worker"]["deploy"]["replicas"]


def test_the_number_of_replicas_is_one_setting_that_every_role_has() -> None:
    assert {settings_of(service).nats.replicas for _, service in OURS} == {len(SERVERS)}
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    assert text.count("PENSTOCK_NATS_REPLICAS") == 1


@pytest.mark.parametrize(("role", "service"), OURS)
def test_every_role_knows_all_servers_and_the_password(role: str, service: str) -> None:
    urls = environment(service)["PENSTOCK_NATS"].split(",")
    assert urls == [f"nats://penstock:{PASSWORDS['NATS_PASSWORD']}@{server}:4222" for server in SERVERS]


@pytest.mark.parametrize(("role", "service"), OURS)
def test_every_role_waits_for_the_servers(role: str, service: str) -> None:
    assert SERVICES[service]["depends_on"] == {name: {"condition": "service_healthy"} for name in SERVERS}
    assert all("healthcheck" in SERVICES[name] for name in [*SERVERS, service])


def test_each_ingress_has_a_port_of_its_own() -> None:
    ports = [published(service) for service in ROLES["ingress"]]
    assert [list(port) for port in ports] == [[8001], [8002]]
    for service, port in zip(ROLES["ingress"], ports, strict=True):
        assert list(port.values()) == [settings_of(service).ingress.port]
        assert settings_of(service).ingress.host == "0.0.0.0"


def test_the_ledger_listens_on_the_port_that_is_published() -> None:
    settings = settings_of("ledger").ledger
    assert (list(published("ledger").values()), settings.host) == ([settings.port], "0.0.0.0")


@pytest.mark.parametrize("service", ["ingress-1", "ingress-2", "ledger"])
def test_the_health_check_asks_the_services_own_port_for_a_path_it_has(service: str) -> None:
    port, path = health_url(service)
    assert port in published(service).values()
    module = importlib.import_module("ledger.server" if service == "ledger" else build_app.__module__)
    assert module.__file__ is not None
    assert f'Route("{path}"' in Path(module.__file__).read_text(encoding="utf-8")


def health_url(service: str) -> tuple[int, str]:
    script = SERVICES[service]["healthcheck"]["test"]
    assert script[:3] == ["CMD", "python", "-c"]
    compile(script[3], "health check", "exec")
    found = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", script[3])
    assert found is not None
    return int(found[1]), found[2]


def test_the_worker_is_healthy_once_its_ready_file_is_there() -> None:
    arguments = SERVICES["worker"]["command"]
    ready_file = arguments[arguments.index("--ready-file") + 1]
    assert f"os.stat('{ready_file}')" in SERVICES["worker"]["healthcheck"]["test"][3]
    assert ready_file.startswith("/tmp/"), "it must be gone after a restart"
    assert "/tmp" in SERVICES["worker"]["tmpfs"]


def test_stopping_gives_each_role_the_time_that_it_takes() -> None:
    settings = load(None, {})
    needed = {
        "ingress-1": settings.ingress.stop_wait_s,
        "ingress-2": settings.ingress.stop_wait_s,
        "worker": settings.worker.stop_wait_s,
    }
    assert ingress_process.LAST_WORDS_S + ingress_process.FLUSH_WAIT_S < STOP_EXTRA_S
    assert worker.FLUSH_WAIT_S < STOP_EXTRA_S
    for service, seconds in needed.items():
        assert int(SERVICES[service]["stop_grace_period"].removesuffix("s")) > seconds


@pytest.mark.parametrize("service", [*SERVERS, *(name for _, name in OURS)])
def test_every_volume_secret_and_config_is_declared(service: str) -> None:
    spec = SERVICES[service]
    assert {volume.split(":")[0] for volume in spec.get("volumes", [])} <= COMPOSE["volumes"].keys()
    assert set(spec.get("secrets", [])) <= COMPOSE["secrets"].keys()
    assert {config["source"] for config in spec["configs"]} <= COMPOSE["configs"].keys()
    targets = {config["target"] for config in spec["configs"]}
    arguments = spec["command"]
    assert arguments[arguments.index("--config") + 1] in targets


def test_every_volume_and_secret_is_used_once_or_more() -> None:
    volumes = [volume.split(":")[0] for spec in SERVICES.values() for volume in spec.get("volumes", [])]
    assert sorted(volumes) == sorted(COMPOSE["volumes"]), "no two services share a folder"
    assert {name for spec in SERVICES.values() for name in spec.get("secrets", [])} == COMPOSE["secrets"].keys()
    assert all((ROOT / config["file"]).is_file() for config in COMPOSE["configs"].values())


def test_the_keys_come_from_files_that_are_mounted() -> None:
    for service in ROLES["ingress"]:
        for name, _ in GIVEN_KEYS:
            assert name not in environment(service), "a key does not belong into the environment"
            file = Path(environment(service)[f"{name}_FILE"])
            assert file.parent == Path("/run/secrets")
            assert file.name in SERVICES[service]["secrets"]


def test_the_ledger_keeps_its_home_on_its_volume() -> None:
    volume, target = SERVICES["ledger"]["volumes"][0].split(":")
    assert (volume, target) == ("ledger", environment("ledger")["PENSTOCK_HOME"])
    assert f"install -d -m 700 -o penstock {target}" in dockerfile(), "or the volume belongs to root"


def test_no_secret_is_written_in_the_file() -> None:
    for name in PASSWORDS:
        assert f"${{{name}:?" in (ROOT / "compose.yaml").read_text(encoding="utf-8")


# NATS


@pytest.mark.parametrize("server", SERVERS)
def test_the_servers_configuration_is_one_that_nats_takes(server: str) -> None:
    check = subprocess.run(
        [find_binary(), "-t", "-c", str(ROOT / "deploy" / "nats.conf")],
        env={**os.environ, **environment(server)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_gets_every_variable_of_its_configuration_and_no_other(server: str) -> None:
    lines = nats_conf().splitlines()
    used = {name for line in lines if not line.strip().startswith("#") for name in re.findall(r"\$(\w+)", line)}
    assert used == environment(server).keys()


def test_every_server_has_its_own_name_and_folder_and_routes_to_all_others() -> None:
    names = [environment(server)["NATS_NAME"] for server in SERVERS]
    assert names == [f'"{server}"' for server in SERVERS]
    for server in SERVERS:
        hosts = re.findall(r'"nats://cluster:([^@"]+)@([\w-]+):6222"', environment(server)["NATS_ROUTES"])
        assert hosts == [(PASSWORDS["NATS_CLUSTER_PASSWORD"], other) for other in SERVERS]
        store = environment(server)["NATS_STORE"].strip('"')
        assert f"{server}:{store}" in SERVICES[server]["volumes"]


def test_the_server_is_as_new_as_the_code_demands_and_unreachable_from_outside() -> None:
    for server in SERVERS:
        image = SERVICES[server]["image"]
        version = re.fullmatch(r"nats:(\d+)\.(\d+)(?:\.\d+)?-alpine", image)
        assert version is not None
        assert (int(version[1]), int(version[2])) >= (2, 15)
        assert "ports" not in SERVICES[server]
        assert environment(server)["NATS_MONITOR"] == '"127.0.0.1:8222"'
        assert any("http://127.0.0.1:8222/healthz" in word for word in SERVICES[server]["healthcheck"]["test"])


def test_the_cluster_has_the_limits_of_the_embedded_server() -> None:
    embedded = server_config(NatsSettings(), Path("/"), port=-1, password="")
    for line in (
        "sync_interval: always",
        "default_max_consumers: 20000",
        "max_ack_pending: 20000",
        'duplicate_window: "10m"',
    ):
        assert line in embedded
        assert line in nats_conf()
    settings = NatsSettings()
    assert f"max_payload: {settings.max_payload_bytes // MIB}MB" in nats_conf()
    assert f"max_memory_store: {settings.max_memory_store_bytes // 1024 // MIB}GB" in nats_conf()
    assert f"max_file_store: {settings.max_file_store_bytes // 1024 // MIB}GB" in nats_conf()


def nats_conf() -> str:
    return (ROOT / "deploy" / "nats.conf").read_text(encoding="utf-8")


# The image


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def copied() -> list[str]:
    lines = re.findall(r"^COPY (?!--from)(.+)$", dockerfile(), re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_everything_that_is_copied_into_the_image_exists() -> None:
    assert [source for source in copied() if not (ROOT / source).exists()] == []


def test_the_image_has_every_package_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = [name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    modules = [f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"]]
    assert {*packages, *modules, project["project"]["readme"], "LICENSE", "pyproject.toml"} <= set(copied())


def test_the_build_context_is_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == set(copied())
    assert any(fnmatch.fnmatch("ledger/__pycache__", rule) for rule in rules[1:])


def test_the_image_installs_what_is_locked_with_hashes() -> None:
    assert "--require-hashes --only-binary :all: -r /src/requirements/runtime.lock" in dockerfile()
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    images = re.findall(r"^FROM (\S+)", dockerfile(), re.MULTILINE)
    assert images == ["python:3.11-slim", "python:3.11-slim"]
    assert requires == ">=3.11"


def test_the_image_runs_penstock_as_somebody_without_rights() -> None:
    assert re.search(r"^USER 10001$", dockerfile(), re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["penstock"\]$', dockerfile(), re.MULTILINE), "or signals end at a shell"
    for _, service in OURS:
        assert SERVICES[service]["init"] is True
        assert SERVICES[service]["read_only"] is True


# What lies in deploy/


def test_the_example_of_routes_is_valid_once_it_is_used(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "penstock.toml").read_text(encoding="utf-8")
    used = tmp_path / "penstock.toml"
    used.write_text(re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE), encoding="utf-8")
    assert [route.id for route in load(used, {}).routes] == ["openai", "vllm"]
    as_it_stands = with_builtin_routes(settings_of("worker").routes, {})
    assert [route.id for route in as_it_stands] == ["echo"]


def test_init_makes_each_secret_once_and_keeps_others_out(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    script = shutil.copy(ROOT / "deploy" / "init", tmp_path / "deploy" / "init")
    made = [run_init(script, tmp_path) for _ in range(2)]
    assert made[0] == made[1]
    assert {name.partition("=")[0] for name in made[0][".env"].split()} == PASSWORDS.keys()
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    assert (tmp_path / "deploy" / "secrets").stat().st_mode & 0o077 == 0
    secrets = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    assert secrets == made[0].keys() - {".env"}
    environ = {f"{name}_FILE": str(tmp_path / "deploy" / "secrets" / name[9:].lower()) for name, _ in GIVEN_KEYS}
    keys = given_keys(environ)
    assert len({key for key, _ in keys}) == len(GIVEN_KEYS)
    assert all(re.fullmatch(r"sk-penstock-[0-9a-f]{64}", key) for key, _ in keys)


def run_init(script: Path, folder: Path) -> dict[str, str]:
    subprocess.run([script], check=True, timeout=20, capture_output=True)
    files = [folder / ".env", *(folder / "deploy" / "secrets").iterdir()]
    return {file.name: file.read_text(encoding="ascii") for file in files}


def test_what_init_makes_is_never_committed() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {".env", "deploy/secrets/"} <= set(ignored)
