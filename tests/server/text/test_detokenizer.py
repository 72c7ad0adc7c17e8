from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loraplex_server.text.detokenizer import Detokenizer
from loraplex_server.text.vocabulary import Vocabulary
from tests.support.tiny_tokenizer import make_tokenizer

VOCABULARY = Vocabulary(make_tokenizer())
ids = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=60)


def make_detokenizer(skip: bool = True, prompt: tuple[int, ...] = ()) -> Detokenizer:
    skipped = VOCABULARY.special_ids if skip else ()
    decode = VOCABULARY.decoder(skip_special_tokens=skip)
    return Detokenizer(decode, skipped_ids=skipped, prompt_ids=prompt)


def pieces_of(token_ids: list[int], detokenizer: Detokenizer) -> list[str]:
    return [detokenizer.push(token_id) for token_id in token_ids] + [detokenizer.flush()]


def test_a_character_over_several_tokens_comes_whole():
    token_ids = VOCABULARY.encode("a😀é")
    assert len(token_ids) == 7
    pieces = pieces_of(token_ids, make_detokenizer())
    assert pieces == ["a", "", "", "", "😀", "", "é", ""]


def test_incomplete_bytes_at_the_end_come_with_flush():
    token_ids = VOCABULARY.encode("ok😀")[:-1]
    assert pieces_of(token_ids, make_detokenizer()) == ["o", "k", "", "", "", "\ufffd"]


def test_special_tokens_are_skipped_or_written():
    token_ids = VOCABULARY.encode("hello<|end|>")
    assert "".join(pieces_of(token_ids, make_detokenizer())) == "hello"
    assert "".join(pieces_of(token_ids, make_detokenizer(skip=False))) == "hello<|end|>"


def test_a_special_token_inside_a_character_does_not_part_it():
    first, *rest = VOCABULARY.encode("é")
    assert "".join(pieces_of([first, *[0] * 20, *rest], make_detokenizer())) == "é"


@given(ids)
def test_pieces_join_to_the_decoding_of_all_tokens(token_ids: list[int]):
    decode = VOCABULARY.decoder(skip_special_tokens=True)
    assert "".join(pieces_of(token_ids, make_detokenizer())) == decode(token_ids)


@given(st.binary(max_size=40), st.text(max_size=10))
def test_invalid_bytes_join_to_the_lossy_decoding(garbage: bytes, text: str):
    by_byte = {VOCABULARY.token_bytes(i): i for i in range(len(VOCABULARY))}
    raw = garbage + text.encode()
    token_ids = [by_byte[bytes([byte])] for byte in raw]
    joined = "".join(pieces_of(token_ids, make_detokenizer()))
    assert joined == raw.decode("utf-8", errors="replace")


@given(st.text(max_size=8), st.text(max_size=20))
def test_the_answer_continues_the_prompt(prompt: str, text: str):
    prompt_ids = tuple(VOCABULARY.encode(prompt))
    detokenizer = make_detokenizer(skip=False, prompt=prompt_ids)
    assert "".join(pieces_of(VOCABULARY.encode(text), detokenizer)) == text
