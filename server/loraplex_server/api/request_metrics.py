"""Counters and histograms of requests, filled in as their answers are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraplex_scheduler.plan import FinishReason
from loraplex_server.api.error_table import REJECTIONS, shape_of
from loraplex_server.api.errors import Overloaded
from loraplex_server.api.families import family, histogram
from loraplex_server.api.series import SERIES
from loraplex_server.api.top_names import TopCounts
from loraplex_server.engine.tally import Tally

#: vLLM's reasons. What was never let in has none there.
_VLLM_REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.TIMED_OUT: "abort",
    FinishReason.FAILED: "error",
}
#: Shown under two names, ours without a label and vLLM's with its own.
_TWINS: Final = {
    "loraplex_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "loraplex_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "loraplex_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
}
_TOP_COLUMNS: Final = (
    *("requests", "prompt_tokens", "generated_tokens", "errors"),
    *("ttft_seconds", "first_tokens"),
)


def _tally(name: str) -> Tally:
    return Tally(SERIES[name].borders)


class RequestMetrics(Collector):
    """What the API process alone can measure; used from the event loop.

    Each token costs one observation, which is a list look-up; the rest is per sequence.

    Args:
        base_name: what vLLM's label `model_name` says.
        top_k: adapters, and tenants, that have series of their own.
        clock: in seconds.
    """

    def __init__(self, base_name: str, top_k: int, clock: Callable[[], float]) -> None:
        self.base_name = base_name
        # Every outcome and reason is on the page from the start.
        self._finished = dict.fromkeys(FinishReason, 0)
        self._rejected = {shape_of(kind).code: 0 for kind in REJECTIONS}
        self.first_token = _tally("loraplex_time_to_first_token_seconds")
        self.inter_token = _tally("loraplex_inter_token_latency_seconds")
        self.e2e = _tally("loraplex_e2e_request_latency_seconds")
        self.adapter_wait = _tally("loraplex_request_adapter_wait_seconds")
        self.queue = _tally("vllm:request_queue_time_seconds")
        self.prefill = _tally("vllm:request_prefill_time_seconds")
        self.decode = _tally("vllm:request_decode_time_seconds")
        self.inference = _tally("vllm:request_inference_time_seconds")
        self.per_token = _tally("vllm:request_time_per_output_token_seconds")
        self.prompt_len = _tally("vllm:request_prompt_tokens")
        self.answer_len = _tally("vllm:request_generation_tokens")
        self.num_prompt_tokens = 0
        self.adapters = TopCounts(_TOP_COLUMNS, top_k, clock)
        self.tenants = TopCounts(_TOP_COLUMNS, top_k, clock)

    def reject(self, kind: type[Overloaded]) -> None:
        """A request was told to come again later; called once for each, whatever it held."""
        self._rejected[shape_of(kind).code] += 1

    def finish(self, outcome: FinishReason, since_arrival_s: float) -> None:
        """A sequence ended; called exactly once for each that was accepted."""
        self._finished[outcome] += 1
        self.e2e.observe(since_arrival_s)

    def collect(self) -> Iterator[Metric]:
        """Yield everything so far; called in the event loop's thread too."""
        yield family(
            "loraplex_requests_finished", [((o.value,), n) for o, n in self._finished.items()]
        )
        yield family("loraplex_requests_rejected", [((r,), n) for r, n in self._rejected.items()])
        model = (self.base_name,)
        successes = {
            reason: sum(n for o, n in self._finished.items() if _VLLM_REASONS.get(o) == reason)
            for reason in dict.fromkeys(_VLLM_REASONS.values())
        }
        yield family("vllm:request_success", [((*model, r), n) for r, n in successes.items()])
        yield family("vllm:prompt_tokens", [(model, self.num_prompt_tokens)])
        yield from self._histograms(model)
        for column in _TOP_COLUMNS:
            yield family(f"loraplex_adapter_{column}", self.adapters.column(column))
            yield family(f"loraplex_tenant_{column}", self.tenants.column(column))

    def _histograms(self, model: tuple[str]) -> Iterator[Metric]:
        tallies = (self.first_token, self.inter_token, self.e2e)
        for (ours, twin), tally in zip(_TWINS.items(), tallies, strict=True):
            counts = tally.counts()
            yield histogram(ours, [((), counts)])
            yield histogram(twin, [(model, counts)])
        yield histogram("loraplex_request_adapter_wait_seconds", [((), self.adapter_wait.counts())])
        for name, tally in (
            ("queue_time_seconds", self.queue),
            ("prefill_time_seconds", self.prefill),
            ("decode_time_seconds", self.decode),
            ("inference_time_seconds", self.inference),
            ("time_per_output_token_seconds", self.per_token),
            ("prompt_tokens", self.prompt_len),
            ("generation_tokens", self.answer_len),
        ):
            yield histogram(f"vllm:request_{name}", [(model, tally.counts())])
