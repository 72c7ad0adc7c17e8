from __future__ import annotations

from loraplex_scheduler.plan import EndEvent, FinishReason, SampledToken, StartTimes, TokenEvent
from loraplex_server.text.assembler import TextAssembler, TextOptions
from loraplex_server.text.vocabulary import Vocabulary


def token_events(vocabulary: Vocabulary, text: str, end: FinishReason | None = None):
    token_ids = vocabulary.encode(text)
    ends = [None] * (len(token_ids) - 1) + [end]
    return [
        TokenEvent("r", SampledToken(token_id), finish)
        for token_id, finish in zip(token_ids, ends, strict=True)
    ]


def test_text_and_tokens_add_up(vocabulary):
    assembler = TextAssembler(vocabulary, TextOptions())
    events = token_events(vocabulary, "hello world", FinishReason.LENGTH)
    deltas = [assembler.push([event]) for event in events]
    assert "".join(delta.text for delta in deltas) == "hello world"
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert assembler.is_finished
    assert not assembler.needs_cancel
    assert assembler.num_tokens == len(events)


def test_a_stop_string_finishes_before_the_engine_does(vocabulary):
    assembler = TextAssembler(vocabulary, TextOptions(stop=("lo w",)))
    delta = assembler.push(token_events(vocabulary, "hello world"))
    assert (delta.text, delta.finish_reason) == ("hel", FinishReason.STOP)
    assert delta.stop_reason == "lo w"
    assert assembler.needs_cancel
    late = assembler.push([EndEvent("r", FinishReason.CANCELLED)])
    assert late.is_empty
    assert not assembler.needs_cancel


def test_the_end_token_is_no_text_but_counts(vocabulary):
    assembler = TextAssembler(vocabulary, TextOptions(skip_special_tokens=False))
    delta = assembler.push(token_events(vocabulary, "hello<|end|>", FinishReason.STOP))
    assert (delta.text, delta.stop_reason) == ("hello", None)
    assert len(delta.tokens) == assembler.num_tokens == 2


def test_a_stop_token_is_reported_and_can_be_kept(vocabulary):
    [stop_id] = vocabulary.encode("hello")
    for keep, expected in ((False, "a"), (True, "ahello")):
        options = TextOptions(include_stop_str_in_output=keep)
        assembler = TextAssembler(vocabulary, options, stop_token_ids=frozenset({stop_id}))
        events = [
            *token_events(vocabulary, "a"),
            TokenEvent("r", SampledToken(stop_id), FinishReason.STOP),
        ]
        delta = assembler.push(events)
        assert (delta.text, delta.stop_reason) == (expected, stop_id)


def test_stop_strings_wait_for_min_tokens(vocabulary):
    assembler = TextAssembler(vocabulary, TextOptions(stop=("b",), min_tokens=2))
    delta = assembler.push(token_events(vocabulary, "abab", FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason) == ("aba", FinishReason.STOP)


def test_held_text_is_given_at_the_end(vocabulary):
    assembler = TextAssembler(vocabulary, TextOptions(stop=("hello!",)))
    delta = assembler.push(token_events(vocabulary, "hello", FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason) == ("hello", FinishReason.LENGTH)


def test_a_failure_carries_its_message(vocabulary):
    assembler = TextAssembler(vocabulary, TextOptions())
    assembler.push(token_events(vocabulary, "hello"))
    delta = assembler.push([EndEvent("r", FinishReason.FAILED, "out of luck")])
    assert (delta.finish_reason, delta.message) == (FinishReason.FAILED, "out of luck")


def test_an_end_that_comes_with_the_first_token_keeps_its_times(vocabulary):
    times = StartTimes(queue_s=1.0, load_s=2.0, prefill_s=3.0)
    events = [
        TokenEvent("r", SampledToken(5), times=times),
        EndEvent("r", FinishReason.TIMED_OUT),
    ]
    delta = TextAssembler(vocabulary, TextOptions()).push(events)
    assert (delta.times, delta.finish_reason) == (times, FinishReason.TIMED_OUT)
