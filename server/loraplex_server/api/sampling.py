"""From a request's fields to the sampling parameters of each of its sequences."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Sequence
from typing import Final, TypeVar

from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.api.schemas import GenerationBody
from loraplex_server.text.assembler import TextOptions
from loraplex_server.text.vocabulary import Vocabulary

_T = TypeVar("_T")
_SEED_MASK: Final = 2**64 - 1


def base_sampling(
    body: GenerationBody,
    vocabulary: Vocabulary,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: str | None,
) -> SamplingParams:
    """Return what all sequences of a request share; its seed is the request's, or a random one.

    Args:
        max_tokens, logprobs, prompt_logprobs, grammar: as of `SamplingParams`; endpoints have
            their own ways of saying them.

    Raises:
        InvalidSampling, UnknownToken: naming the field.
    """
    stop_token_ids = body.stop_token_ids or []
    vocabulary.check(stop_token_ids, param="stop_token_ids")
    vocabulary.check(list(body.logit_bias), param="logit_bias")
    allowed = body.allowed_token_ids
    vocabulary.check(allowed or [], param="allowed_token_ids")
    seed = secrets.randbits(64) if body.seed is None else body.seed & _SEED_MASK
    top_k = body.top_k if body.top_k not in (None, -1) else 0  # -1 is vLLM's "off"
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_k=min(_or(top_k, 0), len(vocabulary)),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=body.logit_bias,
        seed=seed,
        stop_token_ids=frozenset(stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        allowed_token_ids=None if allowed is None else frozenset(allowed),
        bad_words=_bad_words(body.bad_words or [], vocabulary),
        grammar=grammar,
    )


def _bad_words(words: Sequence[str], vocabulary: Vocabulary) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of words, each as a text begins with it and after a space.

    As in vLLM. Other ways of cutting a word into tokens are rare, and not found.
    """
    spellings = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}")]
    encoded = (tuple(vocabulary.encode(text, add_special_tokens=False)) for text in spellings)
    return tuple(dict.fromkeys(filter(None, encoded)))


def text_options(body: GenerationBody) -> TextOptions:
    """Return how the request wants its tokens written down."""
    return TextOptions(
        stop=tuple(body.stop),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
    )


def sequence_sampling(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of sequence `index` of a request.

    Sequence 0 draws with the request's seed, sequence i with the first eight bytes of
    BLAKE2b(seed as 8 little-endian bytes, then i likewise): no two samples are alike, and one seed
    reproduces them all.
    """
    if index == 0:
        return sampling
    message = sampling.seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    digest = hashlib.blake2b(message, digest_size=8).digest()
    return dataclasses.replace(sampling, seed=int.from_bytes(digest, "little"))


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
