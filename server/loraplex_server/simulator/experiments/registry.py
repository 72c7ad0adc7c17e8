"""All experiments by name."""

from __future__ import annotations

from typing import Final

from loraplex_server.simulator.experiments import (
    chameleon,
    fairness,
    fleet_death,
    fleet_size,
    hour,
    multi_turn,
    overload,
    scale,
    thrash,
    validate,
)
from loraplex_server.simulator.experiments.options import Experiment

EXPERIMENTS: Final = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "validate", "S-LoRA's published throughputs, with its policies", 3, validate.run
        ),
        Experiment(
            "adapters", "10 to 100,000 adapters: ours and S-LoRA's engine", 4, scale.run_adapters
        ),
        Experiment(
            "replicas", "1 to 64 replicas, routed by adapter or in turn", 8, scale.run_replicas
        ),
        Experiment(
            "fairness", "VTC's service gap against first come, first served", 3, fairness.run
        ),
        Experiment(
            "overload", "first tokens in time at 1.5 x capacity, and an oracle", 4, overload.run
        ),
        Experiment("fleet", "replicas for 100,000 adapters at 1,000 req/s", 3, fleet_size.run),
        Experiment("fleet-death", "the same, when a replica dies", 1, fleet_death.run),
        Experiment("chameleon", "load at the P99 TTFT SLO on Chameleon's mix", 4, chameleon.run),
        Experiment("multi-turn", "what the prefix cache is worth to chats", 2, multi_turn.run),
        Experiment("thrash", "more adapters in use than the pool holds", 2, thrash.run),
        Experiment("hour", "the simulator's own speed: 36,000 requests", 2, hour.run),
    )
}
