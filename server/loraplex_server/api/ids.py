"""Ids as OpenAI's newer and Anthropic's endpoints write them."""

from __future__ import annotations

import secrets


def new_item_id(prefix: str) -> str:
    """Return a fresh id such as `msg_5f0c...`."""
    return f"{prefix}_{secrets.token_hex(16)}"
