from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid

import pytest

from schemas.ids import RequestId, completion_id, new_id, new_name, new_nonce, request_id_of

ID = RequestId("01890a5d-ac96-774b-bcce-b302099a8057")


def test_an_id_is_a_uuid_of_version_7_and_the_rfcs_variant() -> None:
    for _ in range(100):
        made = uuid.UUID(new_id())
        assert (made.version, made.variant) == (7, uuid.RFC_4122)


def test_an_id_is_in_canonical_form() -> None:
    made = new_id()
    assert str(uuid.UUID(made)) == made


def test_an_id_begins_with_the_time() -> None:
    before_ms = time.time_ns() // 1_000_000
    made_ms = uuid.UUID(new_id()).int >> 80
    assert before_ms <= made_ms <= time.time_ns() // 1_000_000
    assert new_id(0x01890A5DAC96 * 1_000_000).startswith("01890a5d-ac96-7")


def test_ids_of_one_instant_differ() -> None:
    assert len({new_id(1_700_000_000_000_000_000) for _ in range(1000)}) == 1000


def test_every_random_bit_of_an_id_varies() -> None:
    """74 of them: none may be stuck, or ids of one millisecond would soon be the same."""
    made = [uuid.UUID(new_id(0)).int for _ in range(200)]
    ones, zeros = 0, 0
    for one in made:
        ones |= one
        zeros |= ~one
    free = (1 << 80) - 1 - (0xF << 76) - (0b11 << 62)
    assert ones & free == free
    assert zeros & free == free


def test_a_nonce_has_128_random_bits() -> None:
    nonces = {new_nonce() for _ in range(100)}
    assert len(nonces) == 100
    assert all(re.fullmatch("[0-9a-f]{32}", nonce) for nonce in nonces)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_makes_other_nonces_than_its_parent() -> None:
    """Random bytes are fetched by the block; a block must not be spent twice."""
    forking = (
        "import os; from schemas.ids import new_id, new_nonce\n"
        "new_nonce(); child = os.fork(); child and os.waitpid(child, 0); print(new_id(0), new_nonce())"
    )
    printed = subprocess.run([sys.executable, "-c", forking], capture_output=True, text=True, check=True).stdout
    assert len(set(printed.split())) == 4


def test_a_process_name_tells_its_role_and_is_its_own() -> None:
    assert re.fullmatch("worker-[0-9a-f]{8}", new_name("worker"))
    assert new_name("worker") != new_name("worker")


def test_a_completion_id_leads_back_to_its_request() -> None:
    assert completion_id(ID) == "chatcmpl-01890a5dac96774bbcceb302099a8057"
    assert request_id_of(completion_id(ID)) == ID


@pytest.mark.parametrize("pasted", [ID, f"  {ID}\n", ID.upper(), ID.replace("-", ""), f"chatcmpl-{ID}"])
def test_a_request_id_is_found_however_it_was_pasted(pasted: str) -> None:
    assert request_id_of(pasted) == ID


@pytest.mark.parametrize("pasted", ["", "chatcmpl-", ID[:-1], ID + "0", ID[:-1] + "g", "request " + ID])
def test_what_is_not_a_request_id_is_refused(pasted: str) -> None:
    with pytest.raises(ValueError, match="is not a request id"):
        request_id_of(pasted)
