"""Secrets of attempts: what an update must carry to be believed."""

from __future__ import annotations

import secrets

_BYTES = 16


def new_token() -> str:
    """A token that nobody can guess: 128 bits."""
    return secrets.token_urlsafe(_BYTES)
