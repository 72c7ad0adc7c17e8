"""What is refused when more is asked for than can be done in time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, log
from typing import Final, Protocol

from loraplex_scheduler.answer_lengths import AnswerLengths
from loraplex_scheduler.sequence import Sequence
from loraplex_scheduler.step_times import StepLoad, StepTimes
from loraplex_scheduler.ttft import Situation, everybody, predict


@dataclass(frozen=True)
class Rejection:
    """Why a request is turned away, and when it may come again (seconds from now).

    None: it need not, as it asks for more than an engine without other work could do.
    """

    message: str
    retry_after_s: float | None


class OverloadPolicy(Protocol):
    """Owned by the scheduler."""

    def refuse(self, newcomer: Sequence, situation: Situation, now: float) -> Rejection | None:
        """Decide on arrival, before the newcomer waits; None accepts it."""

    def drop(self, situation: Situation, now: float) -> list[tuple[Sequence, Rejection]]:
        """Return who waits without a token yet and cannot be served in time any more, each once.

        Called before each step's admissions; must cost next to nothing when nobody is late.
        """


class NoOverloadControl:
    """Everybody waits for as long as it takes."""

    def refuse(self, newcomer: Sequence, situation: Situation, now: float) -> Rejection | None:
        return None

    def drop(self, situation: Situation, now: float) -> list[tuple[Sequence, Rejection]]:
        return []


#: Nobody is told to come back sooner than this, in seconds.
_MIN_RETRY_S: Final = 0.1

#: Promises are to be kept for this share of the requests that are accepted in a queue.
_KEPT_SHARE: Final = 0.95

#: How far one observation moves the logarithm of the correction, and its bounds. What is observed
#: was predicted a whole wait ago, so faster learning overshoots.
_CORRECTION_RATE: Final = 0.05
_MAX_CORRECTION: Final = log(4.0)

#: Predictions that are watched at once, of those that are a good part of what was promised.
_MAX_WATCHED: Final = 64
_WATCHED_PART: Final = 0.5

#: Promises that were kept are not worth looking for when there are no more of them than this.
_MIN_FORGOTTEN: Final = 64

#: A deadline is distant when it is so many times the forecast away; looked at again after a while,
#: which is a small part of the time that is left until such a deadline.
_DISTANT: Final = 8.0
_FORGET_DISTANT_S: Final = 1.0
_FORGET_DISTANT_PART: Final = 1 / 64


class KeepPromises:
    """Refuses on arrival what would not get its first token by the time promised, or not end by its
    deadline for having waited, and drops who waits once it is too late.

    So the queue stays as short as what can be served in time, and none of it is served in vain. To
    serve as many as possible, the largest goes when there is too much: rather than a newcomer, a
    larger one of the same tenant that waits for its first token (Moore and Hodgson's rule for the
    fewest late jobs, 1968, as jobs come). No tenant loses a place to another one.
    Predictions are corrected by a factor learned from how they came true: the quantile of
    `_KEPT_SHARE` of observed over predicted, by stochastic approximation in the logarithm
    (Robbins and Monro), which a few wild observations do not move far.
    """

    def __init__(
        self, times: StepTimes, lengths: AnswerLengths, ttft_slo_s: float | None = None
    ) -> None:
        """
        Args:
            ttft_slo_s: seconds from arrival promised to requests that ask for nothing else.
        """
        self._times = times
        self._lengths = lengths
        self._ttft_slo_s = ttft_slo_s
        self._log_correction = 0.0
        # A deadline so far away was met many times over by the forecast, which holds for a while.
        self._distant_s, self._distant_until_s = inf, 0.0
        self._distant_len = 0
        # When each must have started, had it its adapter. Those who did are taken out then.
        self._starts: list[tuple[float, int, Sequence]] = []
        self._watched: list[tuple[Sequence, float, float]] = []  # and accepted when, predicted
        self._victims: dict[Sequence, Rejection] = {}

    def _is_distant(self, left_s: float, num_waiting: int, now: float) -> bool:
        """Whether a deadline is so far away that it needs no forecast: one takes a millisecond."""
        is_fresh = now <= self._distant_until_s and num_waiting <= self._distant_len
        return is_fresh and left_s >= self._distant_s

    @property
    def correction(self) -> float:
        """What predictions are multiplied with."""
        return exp(self._log_correction)

    def refuse(self, newcomer: Sequence, situation: Situation, now: float) -> Rejection | None:
        by_s, deadline_s = self._promise(newcomer), newcomer.request.deadline_s
        if by_s is None and (
            deadline_s is None or self._is_distant(deadline_s - now, len(situation.waiting), now)
        ):
            return None
        forecast = predict(newcomer, situation, self._times, self._lengths)
        first_s = forecast.first_token_s * self.correction
        if by_s is not None and now + first_s > by_s:
            alone_s = self._prefill_s(newcomer)
            if newcomer.request.arrival_s + alone_s > by_s:
                promised_s = by_s - newcomer.request.arrival_s
                return Rejection(
                    f"the first token takes {alone_s:.3f} s even when nothing else runs, and was "
                    f"asked for in {promised_s:.3f} s: allow it more time",
                    None,
                )
            rejection = _too_late("first token", first_s, by_s - now)
            if not self._try_displace(newcomer, situation, rejection):
                return rejection
        if deadline_s is not None:
            left_s, answer_s = deadline_s - now, forecast.answer_s
            # An answer that takes too long even alone is no matter of overload, and may be short.
            if first_s + (answer_s if answer_s <= left_s else 0.0) > left_s:
                return _too_late("last token", first_s + answer_s, left_s)
            if _DISTANT * (first_s + answer_s) < left_s:
                self._distant_s = left_s
                holds_s = max(_FORGET_DISTANT_S, _FORGET_DISTANT_PART * left_s)
                self._distant_until_s = now + holds_s
                self._distant_len = 2 * len(situation.waiting) + situation.limits.max_running
        if by_s is not None:
            self._watch(newcomer, forecast.first_token_s, by_s, now)
            start_s = by_s - self._prefill_s(newcomer)
            heapq.heappush(self._starts, (start_s, newcomer.order, newcomer))
            self._forget_started(len(situation.waiting) + len(situation.running))
        return None

    def drop(self, situation: Situation, now: float) -> list[tuple[Sequence, Rejection]]:
        self._learn(now)
        return list((dict(self._pop_late(situation, now)) | self._pop_victims(situation)).items())

    def _try_displace(self, newcomer: Sequence, situation: Situation, rejection: Rejection) -> bool:
        """Let the largest that waits go in the newcomer's place, if it is larger."""
        work_s = self._measure_work()
        request = newcomer.request
        candidates = [
            (work_s(s), s.order, s)
            for s in situation.waiting
            if s.num_generated == 0
            and s.request.tenant == request.tenant
            and s.request.priority >= request.priority
            and self._promise(s) is not None
            and s not in self._victims
        ]
        if not candidates:
            return False
        size_s, _, largest = max(candidates)
        if size_s <= work_s(newcomer):
            return False
        self._victims[largest] = Rejection(
            "more was asked for than can be served in time, and this request of up to "
            f"{largest.last_len - largest.num_prompt} tokens gave way to a shorter one",
            rejection.retry_after_s,
        )
        return True

    def _measure_work(self) -> Callable[[Sequence], float]:
        """Return a function that tells the seconds of the engine's time that a sequence may take.

        Its answer counts as long as it may become: what was learned of others does not tell the
        long ones apart.
        """
        step_s = self._times.step_s
        nothing_s = step_s(StepLoad(0, 0, 0, 0))
        token_s = (step_s(StepLoad(1024, 0, 0, 0)) - nothing_s) / 1024
        decode_s = step_s(StepLoad(1, 1, 0, 0)) - nothing_s
        kv_s = (step_s(StepLoad(0, 0, 65536, 0)) - nothing_s) / 65536

        def work_s(sequence: Sequence) -> float:
            num_prompt, rest = sequence.num_prompt, sequence.last_len - sequence.num_tokens
            return num_prompt * token_s + rest * (decode_s + kv_s * (num_prompt + rest / 2))

        return work_s

    def _pop_victims(self, situation: Situation) -> dict[Sequence, Rejection]:
        """Return those who gave way and still wait."""
        victims, self._victims = self._victims, {}
        return {s: rejection for s, rejection in victims.items() if s in situation.waiting}

    def _pop_late(self, situation: Situation, now: float) -> list[tuple[Sequence, Rejection]]:
        """Return who waits and must have started by now to get its first token in time."""
        late: list[Sequence] = []
        while self._starts and self._starts[0][0] <= now:
            start_s, order, sequence = heapq.heappop(self._starts)
            if not sequence.is_live or sequence.num_generated:
                continue
            if sequence in situation.waiting:
                late.append(sequence)
            elif start_s < (by_s := self._promised(sequence)):  # it runs, but may be preempted
                heapq.heappush(self._starts, (by_s, order, sequence))
        if not late:
            return []
        forecast = predict(
            late[0], situation, self._times, self._lengths, everybody(situation.waiting)
        )
        first_s = forecast.first_token_s * self.correction
        return [
            (s, _too_late("first token", first_s, self._promised(s) - s.request.arrival_s))
            for s in late
        ]

    def _promise(self, sequence: Sequence) -> float | None:
        """Return when its first token is due, if ever."""
        request = sequence.request
        if request.first_token_by_s is not None or self._ttft_slo_s is None:
            return request.first_token_by_s
        return request.arrival_s + self._ttft_slo_s

    def _promised(self, sequence: Sequence) -> float:
        by_s = self._promise(sequence)
        assert by_s is not None, "it was promised nothing"
        return by_s

    def _prefill_s(self, sequence: Sequence) -> float:
        """Return the time to its first token if nothing else ran."""
        num_tokens = sequence.num_tokens
        found = sequence.table.match(sequence.token_ids, num_tokens - 1)
        num_own = num_tokens - found.num_tokens
        load = StepLoad(num_own, 1, num_tokens, sequence.num_adapter_pages)
        return self._times.step_s(load)

    def _forget_started(self, num_live: int) -> None:
        """Keep nobody until a distant promise is due who has its token, or went away."""
        if len(self._starts) > 2 * num_live + _MIN_FORGOTTEN:
            self._starts = [s for s in self._starts if s[2].is_live and not s[2].num_generated]
            heapq.heapify(self._starts)

    def _watch(self, sequence: Sequence, predicted_s: float, by_s: float, now: float) -> None:
        """Compare a prediction with what comes, if it matters how good it is."""
        matters = predicted_s * self.correction > _WATCHED_PART * (by_s - now) > 0
        if matters and len(self._watched) < _MAX_WATCHED:
            self._watched.append((sequence, now, predicted_s))

    def _learn(self, now: float) -> None:
        """Correct predictions by those watched that have come true, or can no more."""
        for watched in self._watched.copy():
            sequence, since_s, predicted_s = watched
            is_served = sequence.num_generated > 0
            if sequence.is_live and not is_served:
                continue
            self._watched.remove(watched)
            ratio = (now - since_s) / predicted_s
            if ratio > self.correction:
                self._log_correction += _CORRECTION_RATE * _KEPT_SHARE
            elif is_served:
                self._log_correction -= _CORRECTION_RATE * (1 - _KEPT_SHARE)
        bounded = min(max(self._log_correction, -_MAX_CORRECTION), _MAX_CORRECTION)
        self._log_correction = bounded


def _too_late(what: str, predicted_s: float, promised_s: float) -> Rejection:
    return Rejection(
        f"the {what} would come in {predicted_s:.2f} s, and was asked for in {promised_s:.2f} s",
        max(_MIN_RETRY_S, predicted_s - promised_s),
    )
