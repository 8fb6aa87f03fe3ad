"""What people may say of where requests go, and what they are told when they may not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from schemas.chat import ChatRequest, decode_request, for_providers, parameters_of
from schemas.errors import BadRequest
from schemas.money import PriceCap
from schemas.routing import MODELS_MAX, NAMES_MAX, NESTED_MAX, Block, Order, check_order, items_of


def _body(**members: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "hi"}], **members})


def _asked(**wishes: Any) -> ChatRequest:
    return decode_request(_body(provider=wishes))


def test_openrouters_shape_is_read() -> None:
    request = decode_request(
        b'{"model":"m","messages":[{"role":"user","content":"hi"}],"models":["n","o"],"provider":{"order":["a"],'
        b'"only":["a","b"],"ignore":["c"],"allow_fallbacks":false,"require_parameters":true,"quantizations":["fp8"],'
        b'"sort":{"by":"price","partition":"none"},"max_price":{"prompt":0.15,"completion":"0.6","request":0},'
        b'"data_collection":"allow","zdr":false,"preferred_max_latency":{"p90":3},"preferred_min_throughput":50}}'
    )
    wishes = request.provider
    assert wishes is not None
    assert (wishes.order, wishes.only, wishes.ignore) == (("a",), ("a", "b"), ("c",))
    assert (wishes.allow_fallbacks, wishes.require_parameters, wishes.quantizations) == (False, True, ("fp8",))
    assert (wishes.sort_by, wishes.across_models) == ("price", True)
    assert wishes.max_price is not None
    assert wishes.max_price.cap() == PriceCap(prompt=150_000, completion=600_000)
    assert request.models == ("n", "o")


def test_null_is_as_good_as_nothing() -> None:
    request = decode_request(_body(provider=None, models=None))
    assert (request.provider, request.models) == (None, None)
    nothing = dict.fromkeys(["order", "only", "ignore", "sort", "max_price", "data_collection", "zdr"])
    assert _asked(**nothing).provider == _asked().provider


@pytest.mark.parametrize(
    ("wishes", "param", "said"),
    [
        ({"typo": 1}, "provider.typo", "Unknown parameter: 'provider.typo'."),
        ({"order": "a"}, "provider.order", "expected an array"),
        ({"order": [""]}, "provider.order[0]", "length >= 1"),
        ({"order": ["a"] * (NAMES_MAX + 1)}, "provider.order", f"length <= {NAMES_MAX}"),
        ({"only": []}, "provider.only", "it is empty"),
        ({"quantizations": []}, "provider.quantizations", "it is empty"),
        ({"only": ["a"], "ignore": ["b", "a"]}, "provider.only", "everything that it allows is in 'ignore'"),
        ({"sort": "exacto"}, "provider.sort", "'exacto' is none of price, throughput, latency"),
        ({"sort": {"by": "x"}}, "provider.sort", "'x' is none of"),
        ({"sort": {"partition": "x"}}, "provider.sort.partition", "neither model nor none"),
        ({"sort": {"by": "price", "x": 1}}, "provider.sort.x", "Unknown parameter"),
        ({"data_collection": "deny"}, "provider.data_collection", "only 'allow' can be honoured"),
        ({"zdr": True}, "provider.zdr", "can't be honoured"),
        ({"enforce_distillable_text": True}, "provider.enforce_distillable_text", "can't be honoured"),
        ({"max_price": {"audio": 1}}, "provider.max_price.audio", "Unknown parameter"),
        ({"max_price": 1}, "provider.max_price", "expected an object"),
        ({"max_price": {"prompt": True}}, "provider.max_price.prompt", "Invalid type"),
    ],
)
def test_what_can_not_be_honoured_is_refused(wishes: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        _asked(**wishes)
    assert caught.value.param == param
    assert said in caught.value.message


@pytest.mark.parametrize("dollars", [-1, "-0.01", "NaN", "Infinity", 1e300])
@pytest.mark.parametrize("member", ["prompt", "completion", "request", "image"])
def test_a_price_is_zero_or_more(dollars: Any, member: str) -> None:
    wishes = _asked(max_price={member: dollars}).provider
    assert wishes is not None
    assert wishes.max_price is not None
    with pytest.raises(BadRequest) as caught:
        wishes.max_price.cap()
    assert caught.value.param == f"provider.max_price.{member}"


@pytest.mark.parametrize(
    ("dollars", "micro"), [("0", 0), ("0.0000019", 1), ("0.1", 100_000), ("1e-9", 0), ("2", 2 * 10**6)]
)
def test_a_price_is_exact(dollars: str, micro: int) -> None:
    """As a JSON number, and as a string: no double comes between."""
    for written in (dollars, f'"{dollars}"'):
        body = _body(provider={"max_price": {"prompt": 777}}).replace(b"777", written.encode())
        wishes = decode_request(body).provider
        assert wishes is not None
        assert wishes.max_price is not None
        assert wishes.max_price.cap() == PriceCap(prompt=micro)


def test_models_alone_name_the_first() -> None:
    body = msgspec.json.encode({"models": ["a", "b"], "messages": [{"role": "user", "content": "hi"}]})
    assert decode_request(body).model == "a"
    with pytest.raises(BadRequest, match="Missing required parameter: 'model'"):
        decode_request(msgspec.json.encode({"models": [], "messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(BadRequest, match="'models'"):
        decode_request(_body(models=["m"] * (MODELS_MAX + 1)))


def test_what_was_for_us_travels_no_further_and_the_rest_does_as_it_was() -> None:
    rest = b'"model":"m","messages":[{"role":"user","content":"\\u00e9"}],"temperature":1.50,"new":{"a":1.0}'
    body = b'{"provider":{"only":["a"]},' + rest + b',"models":["n"]}'
    assert for_providers(body) == b"{" + rest + b"}"


def test_the_parameters_of_a_body_are_those_that_a_provider_has_to_honour() -> None:
    body = _body(stream=True, provider={}, models=[], temperature=1, seed=None, new=[])
    assert parameters_of(body) == {"temperature", "new"}


@pytest.mark.parametrize(
    "order",
    [
        "ordered",
        "own_first, cheapest",
        ("own_first", "cheapest"),
        (Block(routes=("own",), strategy="fastest"), "weighted"),
    ],
)
def test_strategies_that_there_are(order: Order) -> None:
    check_order(order)
    assert len(items_of(order)) >= 1


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("", "at least one of ordered"),
        (",", "at least one of ordered"),
        ("cheap", "'cheap' is no strategy; there are ordered, own_first"),
        (("ordered", "x"), "'x' is no strategy"),
        ((Block(routes=("a",), strategy="x"),), "'x' is no strategy"),
        ((Block(routes=()),), "at least one route"),
    ],
)
def test_strategies_that_there_are_not(order: Order, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_order(order)


def test_strategies_are_nested_to_a_bound() -> None:
    order: Order = "ordered"
    for _ in range(NESTED_MAX + 1):
        order = (Block(routes=("a",), strategy=order),)
    with pytest.raises(ValueError, match="nested more than"):
        check_order(order)
