from __future__ import annotations

import uuid

from hypothesis import given
from hypothesis import strategies as st

from schemas.ids import RequestId, completion_id, new_id, request_id_of

MS_NS = 1_000_000
instants_ns = st.integers(0, (2**48 - 1) * MS_NS)


@given(instants_ns, instants_ns)
def test_ids_sort_by_the_time_they_were_made(one_ns: int, other_ns: int) -> None:
    """To the millisecond; so that a column of them has useful zone maps."""
    one, other = new_id(one_ns), new_id(other_ns)
    if one_ns // MS_NS != other_ns // MS_NS:
        assert (one < other) == (one_ns < other_ns)


@given(instants_ns)
def test_an_id_tells_its_millisecond(now_ns: int) -> None:
    made = uuid.UUID(new_id(now_ns))
    assert made.int >> 80 == now_ns // MS_NS
    assert (made.version, made.variant) == (7, uuid.RFC_4122)


@given(st.uuids().map(str))
def test_every_request_is_found_by_its_completion(id_: str) -> None:
    assert request_id_of(completion_id(RequestId(id_))) == id_


@given(st.text(max_size=60))
def test_a_paste_is_a_request_id_or_a_value_error(pasted: str) -> None:
    try:
        found = request_id_of(pasted)
    except ValueError:
        return
    assert str(uuid.UUID(found)) == found
