"""Which tokens each row of a step may choose, decided on the host before its logits are there.

Of what a request says, four things take tokens away altogether: its grammar, its
`allowed_token_ids`, its `bad_words` (vLLM's meaning: a sequence of tokens is never completed in the
answer), and `min_tokens`, before which no end token comes. Where nothing is left, the request
is refused: any token would break a promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from loraplex_scheduler.plan import SequenceStep
from loraplex_server.model.errors import NoTokenLeft

Mask = npt.NDArray[np.bool_]


class GrammarMasks(Protocol):
    """Knows the grammars of the requests that have one."""

    def allowed(self, step: SequenceStep) -> Mask:
        """Return, bool `[V]`, which tokens may follow the answer in the step's history.

        The array is the caller's. End tokens are among them exactly where the answer may end.

        Raises:
            NoTokenLeft: the grammar cannot be followed any further; the message says why.
        """


@dataclass
class TokenMasks:
    """What the rows of one step may choose; rows that are in no dict may choose anything.

    Attributes:
        banned: tokens a row may not choose, of rows that need no whole mask.
        allowed: bool `[V]` of the others, never all False.
        failures: why a row may choose nothing.
    """

    banned: dict[int, frozenset[int]] = field(default_factory=dict)
    allowed: dict[int, Mask] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


def mask_rows(
    rows: Sequence[SequenceStep], vocab_size: int, grammars: GrammarMasks | None = None
) -> TokenMasks:
    """Decide for the rows of one step.

    Args:
        rows: all token ids in them are below `vocab_size`.
        grammars: needed if any row has a grammar.
    """
    masks = TokenMasks()
    for index, row in enumerate(rows):
        if not (row.banned_token_ids or row.sampling.restricts_tokens):
            continue
        banned = row.banned_token_ids | _completions(row)
        try:
            mask = _whole_mask(row, vocab_size, grammars)
            if mask is not None:
                mask[list(banned)] = False
                if not mask.any():
                    raise NoTokenLeft(_conflict(row))
                masks.allowed[index] = mask
            elif len(banned) == vocab_size:
                raise NoTokenLeft(_conflict(row))
            elif banned:
                masks.banned[index] = banned
        except NoTokenLeft as error:
            masks.failures[index] = str(error)
    return masks


def _whole_mask(row: SequenceStep, vocab_size: int, grammars: GrammarMasks | None) -> Mask | None:
    sampling = row.sampling
    mask: Mask | None = None
    if sampling.grammar is not None:
        assert grammars is not None, "a request with a grammar was let in"
        mask = grammars.allowed(row)
    if sampling.allowed_token_ids is not None:
        listed = np.zeros(vocab_size, dtype=np.bool_)
        listed[list(sampling.allowed_token_ids)] = True
        mask = listed if mask is None else mask & listed
    return mask


def _completions(row: SequenceStep) -> frozenset[int]:
    """Return the tokens that would complete a bad word."""
    words = row.sampling.bad_words
    if not words:
        return frozenset()
    longest = max(map(len, words)) - 1
    output = row.history[row.num_prompt_text :][-longest:] if longest else ()
    return frozenset(
        word[-1]
        for word in words
        if len(word) == 1 or output[len(output) - len(word) + 1 :] == word[:-1]
    )


def _conflict(row: SequenceStep) -> str:
    sampling = row.sampling
    wishes = {
        "the grammar of the answer": sampling.grammar is not None,
        "`allowed_token_ids`": sampling.allowed_token_ids is not None,
        "`bad_words`": bool(sampling.bad_words),
        "`min_tokens`": bool(row.banned_token_ids),
    }
    named = " and ".join(name for name, is_set in wishes.items() if is_set)
    return f"no token is left to choose: {named} together exclude every one; loosen one of them"
