from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_server.text.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    make_detokenizer,
)
from loraplex_server.text.vocabulary import Vocabulary
from tests.support.tiny_tokenizer import make_tokenizer

VOCABULARY = Vocabulary(make_tokenizer())
ids = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=60)


def make_by_bytes(skip: bool = True, prompt: tuple[int, ...] = ()) -> Detokenizer:
    made = make_detokenizer(VOCABULARY, skip_special_tokens=skip, prompt_ids=prompt)
    assert isinstance(made, ByteDetokenizer)
    return made


def make_by_window(skip: bool = True, prompt: tuple[int, ...] = ()) -> Detokenizer:
    skipped = VOCABULARY.special_ids if skip else ()
    decode = VOCABULARY.decoder(skip_special_tokens=skip)
    return WindowDetokenizer(decode, skipped_ids=skipped, prompt_ids=prompt)


each_kind = pytest.mark.parametrize("make", [make_by_bytes, make_by_window])


def pieces_of(token_ids: list[int], detokenizer: Detokenizer) -> list[str]:
    return [detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.flush()]


@each_kind
def test_a_character_over_several_tokens_comes_whole(make):
    token_ids = VOCABULARY.encode("a😀é")
    assert len(token_ids) == 7
    pieces = pieces_of(token_ids, make())
    assert pieces == ["a", "", "", "", "😀", "", "é", ""]


@each_kind
def test_incomplete_bytes_at_the_end_come_with_flush(make):
    token_ids = VOCABULARY.encode("ok😀")[:-1]
    assert pieces_of(token_ids, make()) == ["o", "k", "", "", "", "\ufffd"]


@each_kind
def test_special_tokens_are_skipped_or_written(make):
    token_ids = VOCABULARY.encode("hello<|end|>")
    assert "".join(pieces_of(token_ids, make())) == "hello"
    assert "".join(pieces_of(token_ids, make(skip=False))) == "hello<|end|>"


@each_kind
def test_a_special_token_inside_a_character_does_not_part_it(make):
    first, *rest = VOCABULARY.encode("é")
    assert "".join(pieces_of([first, *[0] * 20, *rest], make())) == "é"


@each_kind
@given(ids)
def test_pieces_join_to_the_decoding_of_all_tokens(make, token_ids: list[int]):
    decode = VOCABULARY.decoder(skip_special_tokens=True)
    assert "".join(pieces_of(token_ids, make())) == decode(token_ids)


@each_kind
@given(st.binary(max_size=40), st.text(max_size=10))
def test_invalid_bytes_join_to_the_lossy_decoding(make, garbage: bytes, text: str):
    by_byte = {VOCABULARY.token_bytes(i): i for i in range(len(VOCABULARY))}
    raw = garbage + text.encode()
    token_ids = [by_byte[bytes([byte])] for byte in raw]
    joined = "".join(pieces_of(token_ids, make()))
    assert joined == raw.decode("utf-8", errors="replace")


@each_kind
@given(st.text(max_size=8), st.text(max_size=20))
def test_the_answer_continues_the_prompt(make, prompt: str, text: str):
    prompt_ids = tuple(VOCABULARY.encode(prompt))
    detokenizer = make(skip=False, prompt=prompt_ids)
    assert "".join(pieces_of(VOCABULARY.encode(text), detokenizer)) == text


@given(st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=8), ids)
def test_both_kinds_say_the_same_behind_any_prompt(prompt: list[int], token_ids: list[int]):
    made = [make(prompt=tuple(prompt)) for make in (make_by_bytes, make_by_window)]
    by_bytes, by_window = ("".join(pieces_of(token_ids, one)) for one in made)
    assert by_bytes == by_window
