"""The GPU's runner on two ranks, under the interpreter: the tokens of one CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from loraplex_scheduler.plan import Request
from loraplex_scheduler.sampling import SamplingParams
from loraplex_server.engine.gpu_engine import make_device_runner
from loraplex_server.model.spec import ModelSpec
from tests.support.engine import drive, make_core, save_adapter
from tests.support.interpreted import _one_launch_at_a_time  # noqa: F401  (a fixture)
from tests.support.ranks import ThreadTeam
from tests.support.tiny_models import tiny_config, tiny_reference, transformer_of

SIZES = {"max_step_tokens": 32, "max_running": 4}


class CountingRecorder:
    """Records nothing, as `DirectRecorder`, and counts what is replayed."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.num_replays += 1
            run()

        return replay


def make_request(index, adapter):
    prompt = tuple(5 + (3 * index + 7 * k) % 90 for k in range(3 + 4 * index))
    return Request(f"r{index}", prompt, SamplingParams(max_tokens=3, temperature=0.0), adapter)


# Padding rows of a recorded step hold whatever memory held, and under the interpreter numpy tells.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_recorded_and_eager_steps_give_the_tokens_of_one(one_launch_at_a_time, tmp_path):
    sizes = {"head_dim": 16, "intermediate_size": 64, "num_hidden_layers": 1}
    reference = tiny_reference(tiny_config("llama", **sizes))
    spec = ModelSpec.from_config(reference.config, base_name="tiny")
    small, large = (
        save_adapter(tmp_path, spec.geometry, name=f"a{rank}", rank=rank, seed=rank)
        for rank in (3, 65)
    )
    together = [make_request(0, None), make_request(1, small), make_request(2, large)]
    alone = [make_request(3, large)]  # more than the recorded step of one row sends
    core = make_core(transformer_of(reference))
    expected = [drive(core, requests) for requests in (together, alone)]
    core.close()
    recorder = CountingRecorder()
    make_runner = partial(make_device_runner, recorder=recorder, **SIZES)
    state = reference.state_dict()
    # Overlapped, so that each rank has to find the tokens that the first one sampled.
    team = ThreadTeam(spec, state, 2, num_pages=96, make_runner=make_runner, overlap=True, **SIZES)
    try:
        assert drive(team.core, together) == expected[0]
        num_replays = recorder.num_replays
        assert num_replays >= 2, "each rank replays"
        assert drive(team.core, alone) == expected[1]
        assert recorder.num_replays == num_replays
    finally:
        team.close()
