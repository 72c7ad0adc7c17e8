"""Some of the inputs of `run_fuzz.py`, which makes as many as one likes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support.fuzz_corpus import make_corpus
from tests.support.fuzz_uploads import (
    UploadFuzzer,
    bounded_process,
    enter,
    peak_bytes,
    resident_bytes,
)

NUM_INPUTS = 1200
MAX_GROWTH_BYTES = 1 << 30


@pytest.mark.slow
def test_damaged_uploads_are_accepted_or_refused_and_leave_nothing(tmp_path: Path) -> None:
    corpus = make_corpus()
    root = tmp_path / "root"
    root.mkdir()
    kinds: Counter[str] = Counter()
    with bounded_process():
        fuzzer = UploadFuzzer(corpus, root, seed=0)
        enter(root)
        before = max(peak_bytes(), resident_bytes())
        faults = {}
        for index in range(NUM_INPUTS):
            outcome = fuzzer.feed(index)
            kinds[outcome.kind] += 1
            if outcome.fault is not None:
                faults[index] = outcome.fault
        fuzzer.close()
    assert not faults
    assert peak_bytes() - before < MAX_GROWTH_BYTES
    assert kinds.keys() == {"accepted", "AdapterRefused", "InvalidUpload", "UploadTooLarge"}
    assert min(kinds["accepted"], kinds["AdapterRefused"]) > NUM_INPUTS // 20
