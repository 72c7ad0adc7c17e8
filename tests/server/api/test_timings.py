from __future__ import annotations

from loraplex_scheduler.plan import StartTimes
from loraplex_server.api.timings import SequenceTimes, Timings

QUICK = SequenceTimes(StartTimes(0.5, 0.25, 0.25), first_s=11.0, last_s=13.0, num_tokens=5)
LATE = SequenceTimes(StartTimes(2.0, 0.0, 0.5), first_s=12.5, last_s=14.0, num_tokens=4)


def test_the_parts_are_those_of_the_sequence_that_began_first():
    metrics = Timings(10.0, (LATE, QUICK)).metrics(now=15.0)
    assert metrics == {
        "time_to_first_token_ms": 1000.0,
        "queue_time_ms": 500.0,
        "adapter_load_ms": 250.0,
        "prefill_ms": 250.0,
        "decode_ms": 3000.0,
        "generation_time_ms": 3000.0,
        "mean_itl_ms": 500.0,  # 3.5 s of decoding, and 4 + 3 gaps
        "tokens_per_second": round(9 / 3.25, 3),
        "total_time_ms": 5000.0,
    }


def test_parts_of_one_answer_are_merged_from_the_first_arrival_on():
    merged = Timings.merge([Timings(10.0, (QUICK,)), Timings(9.0, (LATE,))])
    metrics = merged.metrics(now=15.0)
    assert (metrics["time_to_first_token_ms"], metrics["total_time_ms"]) == (2000.0, 6000.0)


def test_nothing_is_told_before_the_first_token():
    timings = Timings(10.0, (SequenceTimes(),))
    assert timings.metrics(now=11.0) == {}
    assert timings.headers(now=11.0, is_complete=True) == []


def test_what_has_no_tokens_has_no_rate():
    embedded = SequenceTimes(StartTimes(0.5, 0.0, 0.5), first_s=11.0, last_s=11.0)
    metrics = Timings(10.0, (embedded,)).metrics(now=11.0)
    assert (metrics["prefill_ms"], metrics["tokens_per_second"]) == (500.0, None)


def test_headers_of_a_stream_tell_what_led_to_its_first_token():
    timings = Timings(10.0, (QUICK,))
    assert dict(timings.headers(now=11.0, is_complete=False)) == {
        b"x-queue-time-ms": b"500",
        b"x-adapter-load-ms": b"250",
        b"x-prefill-ms": b"250",
        b"x-time-to-first-token-ms": b"1000",
    }
    whole = dict(timings.headers(now=15.0, is_complete=True))
    assert (whole[b"x-decode-ms"], whole[b"x-total-time-ms"]) == (b"2000", b"5000")
