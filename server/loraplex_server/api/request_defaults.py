"""An adapter's generation defaults, under what a request says itself.

A field that the request has holds, whatever it is: an explicit null asks for the server's default.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

from loraplex_server.adapters.defaults import GenerationDefaults
from loraplex_server.api.schemas import GenerationBody

_Body = TypeVar("_Body", bound=GenerationBody)

#: Two fields of chat for one thing.
_LENGTH_FIELDS: Final = frozenset({"max_tokens", "max_completion_tokens"})


def default_len(
    body: GenerationBody, defaults: GenerationDefaults, usual: int | None
) -> int | None:
    """Return how many tokens the answer has at most where the request does not say.

    Args:
        usual: the endpoint's own default; None is as many as fit.
    """
    if defaults.max_tokens is None or _LENGTH_FIELDS & body.model_fields_set:
        return usual
    return defaults.max_tokens


def fill_in(body: _Body, defaults: GenerationDefaults, *, max_tokens: int) -> _Body:
    """Return the request with the adapter's defaults for what it leaves open.

    Args:
        max_tokens: of the answer; a default of `min_tokens` gives way to it.
    """
    values: dict[str, Any] = defaults.model_dump(exclude_none=True, exclude={"max_tokens"})
    if "min_tokens" in values:
        values["min_tokens"] = min(values["min_tokens"], max_tokens)
    for name in ("stop", "stop_token_ids"):
        if name in values:
            values[name] = list(values[name])
    missing = values.keys() - body.model_fields_set
    return body.model_copy(update={name: values[name] for name in missing})
