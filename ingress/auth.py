"""Bearer key to principal."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from schemas.control import ControlState, KeyStated, Role
from schemas.errors import Forbidden, Unauthorized

KEY_PREFIX = "sk-penstock-"
KEY_BYTES = 32
KEY_CHARS_MAX = 512

Principal = KeyStated

_RANK = {Role.CLIENT: 0, Role.ANALYST: 1, Role.ADMIN: 2}


def authenticate(headers: list[tuple[bytes, bytes]], control: ControlState, *, now_ns: int) -> Principal:
    """The key that the request carries.

    Raises: Unauthorized if it carries none, or one that isn't valid at *now_ns* (UTC).
    """
    key = _bearer(headers)
    if key is None:
        raise Unauthorized("You didn't provide an API key. Send it as 'Authorization: Bearer YOUR_KEY'.")
    found = control.key_of(hash_key(key), now_ns=now_ns)
    if found is None:
        raise Unauthorized
    return found


def require(principal: Principal, role: Role) -> None:
    """Raises: Forbidden if the key's role is below *role*."""
    if _RANK[principal.role] < _RANK[role]:
        raise Forbidden(f"This needs a key with the role '{role.value}'; yours has '{principal.role.value}'.")


def new_key() -> str:
    """A key with 256 random bits: so many that a plain hash of it can't be turned back."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def hint_of(key: str) -> str:
    return key[-4:] if len(key) >= 16 else ""


def _bearer(headers: list[tuple[bytes, Any]]) -> str | None:
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer" and 0 < len(key.strip()) <= KEY_CHARS_MAX:
                return str(key.strip())
    return None
