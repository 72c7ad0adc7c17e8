from __future__ import annotations

import json

import numpy as np
import pytest

from loraplex_server.simulator.errors import SimulationError
from loraplex_server.simulator.lmsys import NUM_MODELS, VTC_LENGTHS, load_trace, matched_trace


def write_log(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def conversation(model, tstamp, *lengths):
    messages = [{"role": "x", "content": "a" * 4 * length} for length in lengths]
    return {"model": model, "tstamp": tstamp, "conversation": messages}


def test_the_matched_workload_has_the_logs_averages():
    trace = matched_trace(rate=100, duration_s=1000)
    assert trace.prompt_len.mean() == pytest.approx(85, rel=0.1)
    assert trace.output_len.mean() == pytest.approx(165, rel=0.1)
    assert trace.num_adapters == NUM_MODELS
    assert trace.arrival_s[-1] == pytest.approx(1000)


def test_vtcs_sample_of_the_log_is_longer():
    trace = matched_trace(rate=100, duration_s=1000, lengths=VTC_LENGTHS)
    assert trace.prompt_len.mean() == pytest.approx(136, rel=0.1)
    assert trace.output_len.mean() == pytest.approx(256, rel=0.1)


def test_a_log_becomes_a_trace_of_single_turns_in_the_asked_time(tmp_path):
    lines = [conversation("a" if i % 3 else "b", 1000.0 + i**2, 10 + i, 20) for i in range(20)]
    lines.append(conversation("c", 1, 5, 5, 5, 5))
    lines.append(conversation("c", 2, 5000, 5))
    trace = load_trace(write_log(tmp_path / "log", lines), rate=1, duration_s=10)
    assert len(trace) == 10
    assert trace.num_adapters == 2
    assert trace.arrival_s[0] == 0.0
    assert trace.arrival_s[-1] == pytest.approx(10)
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert set(trace.output_len.tolist()) == {20}


def test_counts_of_tokens_in_the_log_are_believed(tmp_path):
    line = {"model": "a", "tstamp": 5, "prompt_len": 7, "output_len": 9}
    trace = load_trace(write_log(tmp_path / "log", [line] * 4), rate=2, duration_s=1)
    assert trace.prompt_len.tolist() == [7, 7]
    assert trace.output_len.tolist() == [9, 9]


def test_too_short_a_log_says_what_to_change(tmp_path):
    path = write_log(tmp_path / "log", [conversation("a", 1, 5, 5)])
    with pytest.raises(SimulationError, match="lower the rate"):
        load_trace(path, rate=10, duration_s=10)


@pytest.mark.parametrize("text", ["not json", '{"model": "a"}'])
def test_a_file_that_is_no_log_is_refused(tmp_path, text):
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(SimulationError):
        load_trace(path, rate=1, duration_s=1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SimulationError, match="nowhere"):
        load_trace(tmp_path / "nowhere", rate=1, duration_s=1)
