from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import SetupError
from schemas.ids import RouteId
from schemas.jobs import Timeouts
from schemas.money import FREE, UNKNOWN, Price
from schemas.routes import ECHO, is_own, priced, with_builtin_routes
from schemas.routing import Block, items_of
from schemas.settings import ModelSettings, RouteSettings, Settings, load, secret

ROUTE = '[[routes]]\nid = "r"\nprovider = "openai"\n'
MODEL = ROUTE + '[[routes.models]]\nname = "m"\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "penstock.toml"


def written(config: Path, text: str) -> Settings:
    config.write_text(text, encoding="utf-8")
    return load(config, {})


def refused(config: Path, text: str) -> str:
    with pytest.raises(SetupError) as caught:
        written(config, text)
    assert str(config) in caught.value.message
    return caught.value.message


def test_without_file_environment_and_flags_everything_has_its_default() -> None:
    assert load(None, {}) == Settings()


def test_flags_win_over_the_environment_and_that_over_the_file(config: Path) -> None:
    config.write_text("[ingress]\nport = 1\nhost = 'file'\ndrain_s = 1\n", encoding="utf-8")
    environ = {"PENSTOCK_INGRESS_PORT": "2", "PENSTOCK_INGRESS_HOST": "environ"}
    settings = load(config, environ, ingress={"port": 3, "host": None})
    assert (settings.ingress.port, settings.ingress.host, settings.ingress.drain_s) == (3, "environ", 1.0)


def test_the_environment_is_converted_to_what_the_setting_is() -> None:
    settings = load(None, {"PENSTOCK_INGRESS_DRAIN_S": "1.5", "PENSTOCK_NATS_REPLICAS": "3", "PENSTOCK_HOME": "x"})
    assert (settings.ingress.drain_s, settings.nats.replicas) == (1.5, 3)


def test_tables_within_a_section_are_read(config: Path) -> None:
    settings = written(config, "[ingress.timeouts]\nqueue_s = 1.5\n")
    assert settings.ingress.timeouts == Timeouts(queue_s=1.5)


def test_strategies_are_names_lists_and_tables_within_them(config: Path) -> None:
    text = """
    [routing]
    strategy = [{ routes = ["own"], strategy = "least_busy" }, "cheapest"]
    [routing.models]
    "a/b" = "own_first, fastest"
    c = [{ routes = ["x"], strategy = [{ routes = ["y"] }, "weighted"] }]
    """
    routing = written(config, text).routing
    assert items_of(routing.strategy) == (Block(routes=("own",), strategy="least_busy"), "cheapest")
    assert items_of(routing.models["a/b"]) == ("own_first", "fastest")
    inner = (Block(routes=("y",)), "weighted")
    assert items_of(routing.models["c"]) == (Block(routes=("x",), strategy=inner),)
    by_environ = load(None, {"PENSTOCK_ROUTING_STRATEGY": "own_first,cheapest", "PENSTOCK_ROUTING_COOLDOWN_S": "2"})
    assert items_of(by_environ.routing.strategy) == ("own_first", "cheapest")


def test_what_is_own_can_be_said_and_is_guessed_otherwise(config: Path) -> None:
    text = ROUTE + 'base_url = "{}"\n'
    assert is_own(written(config, text.format("http://127.0.0.1:1/v1")).routes[0])
    assert not is_own(written(config, text.format("https://example.org/v1")).routes[0])
    assert is_own(written(config, text.format("https://example.org/v1") + "own = true\n").routes[0])
    assert not is_own(written(config, text.format("http://localhost/v1") + "own = false\n").routes[0])
    assert is_own(RouteSettings(id=RouteId("v"), provider="vllm"))


def test_prices_are_written_in_dollars_and_kept_exactly(config: Path) -> None:
    settings = written(config, MODEL + 'price = { input = 0.15, cached_input = "0.075", output = 1 }\n')
    price = Price(input=150_000, cached_input=75_000, output=1_000_000)
    assert settings.routes[0].models[0].price == price
    assert type(settings.routes[0].models[0].price) is Price


def test_a_price_no_float_could_hold_is_kept_exactly(config: Path) -> None:
    settings = written(config, MODEL + "price = { input = 123456789012345678.000001 }\n")
    assert settings.routes[0].models[0].price.input == 123456789012345678000001


def test_a_model_is_called_upstream_as_it_is_called_here_unless_said_otherwise(config: Path) -> None:
    settings = written(config, MODEL + '[[routes.models]]\nname = "n"\nupstream = "n-2024"\n')
    assert [model.upstream_name for model in settings.routes[0].models] == ["m", "n-2024"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[ingress", "is not TOML"),
        ("[ingress]\nprot = 1", "`prot`"),
        ("[ingres]\nport = 1", "`ingres`"),
        ("[ingress]\nport = 'many'", "`$.ingress.port`"),
        ("ingress = 5", "`$.ingress`"),
        ("[ingress.timeouts]\nidle = 5", "'idle' is not a time-out"),
        ("[ingress]\ntimeouts = 5", "`$.ingress.timeouts`"),
        ("[routes]\nid = 'r'", "`$.routes`"),
        ("routes = ['r']", "`$.routes[0]`"),
        ("[[routes]]\nid = 'r'", "`provider`"),
        (ROUTE + "models = 5", "`$.routes[0].models`"),
        (ROUTE + "models = ['m']", "`$.routes[0].models[0]`"),
        (ROUTE + "api_key = 'sk-1'", "`api_key`"),
        (ROUTE + "max_concurrency = 0", "max_concurrency must be 1 to 100000"),
        (ROUTE + "max_concurrency = 100001", "max_concurrency must be 1 to 100000"),
        (ROUTE + ROUTE, "two routes have the id 'r'"),
        (ROUTE + "weight = -1", "weight must be 0 to 1000000"),
        ("[routing]\nstrategy = 'cheap'", "'cheap' is no strategy; there are ordered, own_first, cheapest"),
        ("[routing]\nstrategy = []", "names at least one of"),
        ("[routing]\nstrategy = ['ordered', { routes = [] }]", "names at least one route"),
        ("[routing]\nstrategy = [{ route = ['a'] }]", "`route`"),
        ("[routing.models]\nm = ['x']", "'x' is no strategy"),
        ("[routing]\ncooldown_s = 0", "cooldown_s must be above 0"),
        ("[routing]\ncooldown_s = 61", "at most cooldown_max_s"),
        (MODEL + "price = 5", "`$.routes[0].models[0].price`"),
        (MODEL + "price = { inptu = 1 }", "'inptu' is not a price"),
        (MODEL + "price = { input = -1 }", "zero or more"),
        (MODEL + "price = { input = 0.0000001 }", "whole micro-dollars"),
        (MODEL + "price = { input = 'cheap' }", "a number of dollars"),
        (MODEL + "price = { input = true }", "a number of dollars"),
        (MODEL + "price = { input = [1] }", "a number of dollars"),
        (MODEL + "price = { input = inf }", "a number of dollars"),
    ],
)
def test_a_mistake_names_the_file_and_the_setting(config: Path, text: str, words: str) -> None:
    assert words in refused(config, text)


def test_a_mistake_in_the_environment_is_not_passed_over(config: Path) -> None:
    with pytest.raises(SetupError, match="prot"):
        load(None, {"PENSTOCK_INGRESS_PROT": "1"})
    config.write_text("ingress = 5", encoding="utf-8")
    with pytest.raises(SetupError, match=r"\$\.ingress"):
        load(config, {"PENSTOCK_INGRESS_PORT": "1"})


def test_a_file_that_is_not_utf8_is_not_toml(config: Path) -> None:
    config.write_bytes(b"home = '\xff'")
    with pytest.raises(SetupError, match="is not TOML"):
        load(config, {})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"nowhere\.toml can't be read: No such file"):
        load(tmp_path / "nowhere.toml", {})


def test_a_secret_is_read_from_the_environment_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" sk-file \n", encoding="utf-8")
    assert secret("env:KEY", {"KEY": "sk-env\n"}) == "sk-env"
    assert secret(f"file:{tmp_path / 'key'}", {}) == "sk-file"


@pytest.mark.parametrize("reference", ["env:KEY", "env:EMPTY", "file:/nowhere/at/all", "sk-secret", "vault:key", ""])
def test_a_secret_that_is_not_there_is_an_error_without_it(reference: str) -> None:
    with pytest.raises(SetupError) as caught:
        secret(reference, {"EMPTY": " \n"})
    assert "sk-secret" not in caught.value.message


def test_the_model_echo_is_always_offered() -> None:
    assert with_builtin_routes((), {}) == (ECHO,)


def test_keys_of_providers_in_the_environment_become_routes_where_none_is_configured() -> None:
    environ = {"OPENAI_API_KEY": "sk-1", "GROQ_API_KEY": "sk-2", "MISTRAL_API_KEY": ""}
    routes = with_builtin_routes((), environ)
    assert [(route.id, route.base_url, route.api_keys) for route in routes] == [
        ("openai", "https://api.openai.com/v1", ("env:OPENAI_API_KEY",)),
        ("groq", "https://api.groq.com/openai/v1", ("env:GROQ_API_KEY",)),
        ("echo", None, ()),
    ]
    assert "sk-1" not in repr(routes)


def test_the_base_url_of_openais_own_sdk_moves_that_provider_alone() -> None:
    environ = {"OPENAI_API_KEY": "sk", "GROQ_API_KEY": "sk", "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}
    routes = {route.id: route.base_url for route in with_builtin_routes((), environ)}
    assert routes["openai"] == "http://127.0.0.1:1/v1"  # type: ignore[index]
    assert routes["groq"] == "https://api.groq.com/openai/v1"  # type: ignore[index]


def test_configured_routes_are_not_joined_by_found_ones(config: Path) -> None:
    configured = written(config, MODEL).routes
    assert [route.id for route in with_builtin_routes(configured, {"OPENAI_API_KEY": "sk"})] == ["r", "echo"]


def test_a_configured_echo_stands_in_for_the_built_in_one(config: Path) -> None:
    configured = written(config, '[[routes]]\nid = "echo"\nprovider = "echo"\ndelay_ms = 5\n').routes
    assert with_builtin_routes(configured, {}) == configured


def test_a_known_provider_needs_only_its_name(config: Path) -> None:
    routes = written(config, '[[routes]]\nid = "fast"\nprovider = "groq"\n').routes
    [route, _] = with_builtin_routes(routes, {})
    assert (route.base_url, route.api_keys) == ("https://api.groq.com/openai/v1", ("env:GROQ_API_KEY",))


def test_what_a_route_says_comes_before_what_is_known(config: Path) -> None:
    text = """
[[routes]]
id = "fast"
provider = "groq"
api_keys = ["env:MINE"]
[[routes.models]]
name = "mine"
upstream = "openai/gpt-oss-120b"
price = { input = 1, output = 2 }
[[routes.models]]
name = "openai/gpt-oss-120b"
[[routes.models]]
name = "never-heard-of"
"""
    [route, _] = with_builtin_routes(written(config, text).routes, {"GROQ_API_KEY": "sk"})
    assert route.api_keys == ("env:MINE",)
    assert [model.price for model in route.models] == [
        Price(input=1_000_000, output=2_000_000),
        Price(input=150_000, cached_input=75_000, output=600_000),
        UNKNOWN,
    ]


def test_a_key_from_the_environment_goes_to_the_providers_own_address_alone(config: Path) -> None:
    text = '[[routes]]\nid = "r"\nprovider = "{}"\nbase_url = "{}"\n'
    for provider, base_url, keys in (
        ("openai", "https://elsewhere.example/v1", ()),
        ("groq", "https://elsewhere.example/v1", ()),
        ("openai", "https://api.groq.com/openai/v1", ("env:GROQ_API_KEY",)),
        ("azure", "https://me.openai.azure.com/openai/v1", ("env:AZURE_OPENAI_API_KEY",)),
    ):
        [route, _] = with_builtin_routes(written(config, text.format(provider, base_url)).routes, {})
        assert (route.base_url, route.api_keys) == (base_url, keys)


def test_of_several_variables_the_one_that_is_set_holds_the_key() -> None:
    [route, _] = with_builtin_routes((), {"GOOGLE_API_KEY": "sk"})
    assert (route.id, route.api_keys) == ("google-compatible", ("env:GOOGLE_API_KEY",))


@pytest.mark.parametrize(
    ("route", "price"),
    [
        (RouteSettings(id=RouteId("r"), provider="echo"), FREE),
        (RouteSettings(id=RouteId("r"), provider="vllm"), FREE),
        (RouteSettings(id=RouteId("r"), provider="openai", base_url="http://127.0.0.1:11434/v1"), FREE),
        (RouteSettings(id=RouteId("r"), provider="openai", base_url="http://localhost:1234/v1"), FREE),
        (RouteSettings(id=RouteId("r"), provider="openai", base_url="http://[::1]:1/v1"), FREE),
        (RouteSettings(id=RouteId("r"), provider="openai", base_url="http://10.0.0.7:8000/v1"), UNKNOWN),
        (RouteSettings(id=RouteId("r"), provider="openai"), Price(input=150_000, cached_input=75_000, output=600_000)),
        (RouteSettings(id=RouteId("r"), provider="together"), UNKNOWN),
        (RouteSettings(id=RouteId("r"), provider="together", base_url="http://127.0.0.1:1/v1"), UNKNOWN),
    ],
)
def test_a_model_without_a_stated_price_has_the_known_one_or_is_free_here_or_unknown(
    route: RouteSettings, price: Price
) -> None:
    assert priced(route, ModelSettings(name="gpt-4o-mini")).price == price


def test_nobody_can_write_that_a_price_is_unknown(config: Path) -> None:
    with pytest.raises(SetupError, match="'unknown' is not a price"):
        written(config, MODEL + "price = { unknown = true }")


@pytest.mark.parametrize("headers", ['{ X = "a\\r\\nb" }', '{ "" = "a" }', '{ X = "\u00fc" }'])
def test_a_header_that_cannot_be_sent_is_an_error_without_its_value(config: Path, headers: str) -> None:
    with pytest.raises(SetupError, match="no header can be"):
        written(config, ROUTE + f"headers = {headers}")
