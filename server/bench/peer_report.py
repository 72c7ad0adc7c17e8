"""What the comparison found, as Markdown: targets, then every cell, first uses, problems."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "loraplex"
_VLLM, _LLAMA = "vLLM", "llama.cpp"

Record = dict[str, Any]


@dataclass
class Findings:
    """Records of one run, or of several that belong together."""

    records: Sequence[Record]
    #: Records of cells by server and cell.
    cells: dict[tuple[str, str], list[Record]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for record in self.of_kind("cell"):
            self.cells[record["server"], record["cell"]].append(record)

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def median(self, server: str, cell: str, key: str) -> float | None:
        """Return the median over the repeats; None where nothing was measured."""
        return _median(self.cells.get((server, cell), []), key)

    def best_peer(self, cell: str, key: str, best: Callable[..., Any] = max) -> str | None:
        """Return the other server with the best median."""
        values = {
            server: value
            for server, of_cell in list(self.cells)
            if of_cell == cell and server != OURS
            if (value := self.median(server, cell, key)) is not None
        }
        return best(values, key=lambda server: values[server]) if values else None

    def peak_mb(self, server: str, cell: str) -> float | None:
        """Return the largest sample of the memory of any repeat of a cell."""
        values = [r["pss_peak_mb"] for r in self.cells.get((server, cell), [])]
        return max(values, default=None)


@dataclass(frozen=True)
class Target:
    """A ratio to reach. `measure` returns the ratio and who it is against, or None."""

    name: str
    wanted: str
    measure: Callable[[Findings], tuple[float, str] | None]

    def is_met(self, value: float) -> bool:
        sign, number = self.wanted.split()
        return value >= float(number) if sign == ">=" else value <= float(number)


def _rate(cell: str, peer: str | None = None) -> Callable[[Findings], tuple[float, str] | None]:
    """Return what compares rates with one peer, or with the best."""

    def measure(found: Findings) -> tuple[float, str] | None:
        return _ratio(found, cell, "out_tok_s", peer or found.best_peer(cell, "out_tok_s"))

    return measure


def _latency(cell: str) -> Callable[[Findings], tuple[float, str] | None]:
    def measure(found: Findings) -> tuple[float, str] | None:
        key = "latency_p99_s"
        return _ratio(found, cell, key, found.best_peer(cell, key, min))

    return measure


def _ratio(found: Findings, cell: str, key: str, peer: str | None) -> tuple[float, str] | None:
    mine = found.median(OURS, cell, key)
    theirs = found.median(peer, cell, key) if peer else None
    return (mine / theirs, peer) if mine is not None and theirs and peer else None


def _own(cell: str, other: str) -> Callable[[Findings], tuple[float, str] | None]:
    """Return what compares two cells of ours."""

    def measure(found: Findings) -> tuple[float, str] | None:
        first, second = (found.median(OURS, c, "out_tok_s") for c in (cell, other))
        return (first / second, OURS) if first is not None and second else None

    return measure


def _memory(found: Findings) -> tuple[float, str] | None:
    mine, theirs = (found.peak_mb(server, "32:512:0.3") for server in (OURS, _LLAMA))
    return (mine / theirs, _LLAMA) if mine and theirs else None


def _cold(found: Findings) -> tuple[float, str] | None:
    extra = _median([r for r in found.of_kind("cold") if r["server"] == OURS], "extra_ttft_p50_ms")
    return (extra, OURS) if extra is not None else None


def _bandwidth(found: Findings) -> tuple[float, str] | None:
    """Return how close decoding comes to reading each weight once per token."""
    tpot_ms = found.median(OURS, "1:0", "tpot_p50_ms")
    # A disturbed pass reads less and would flatter us: the best is what the machine can do.
    rate = max((record["bytes_per_s"] for record in found.of_kind("machine")), default=None)
    size = _median(found.of_kind("environment"), "weight_bytes")
    if not (tpot_ms and rate and size):
        return None
    return 1e3 * size / rate / tpot_ms, OURS


TARGETS = (
    Target("32 in flight, 32 adapters: ours / best peer", ">= 4.0", _rate("32:32")),
    Target(
        "32 in flight, 512 adapters, alpha 0.3: ours / best peer", ">= 4.0", _rate("32:512:0.3")
    ),
    Target("8 in flight, 32 adapters: ours / best peer", ">= 2.5", _rate("8:32")),
    Target("base, 32 in flight: ours / vLLM", ">= 1.3", _rate("32:0", _VLLM)),
    Target("base, 8 in flight: ours / llama.cpp", ">= 1.2", _rate("8:0", _LLAMA)),
    Target("base, 1 in flight: ours / llama.cpp", ">= 0.95", _rate("1:0", _LLAMA)),
    Target("one adapter / base, 32 in flight", ">= 0.92", _own("32:1", "32:0")),
    Target("32 adapters / base, 32 in flight", ">= 0.85", _own("32:32", "32:0")),
    Target("2,000 adapters, Zipf 1.0 / 32 adapters", ">= 0.90", _own("32:2000:zipf1", "32:32")),
    Target(
        "latency p99, 32 in flight, 512 adapters: ours / best peer",
        "<= 0.35",
        _latency("32:512:0.3"),
    ),
    Target("batch 1 decode: achieved / (weight bytes over bandwidth)", ">= 0.75", _bandwidth),
    Target("first use of an adapter: extra TTFT p50, ms", "<= 10", _cold),
    Target("peak memory, 512 adapters: ours / llama.cpp", "<= 0.5", _memory),
)


def render(records: Sequence[Record]) -> str:
    """Return the report of these records."""
    found = Findings(records)
    parts = [_machine(found), _targets(found), _cells(found), _first_uses(found), _problems(found)]
    return "\n\n".join(part for part in parts if part)


def _machine(found: Findings) -> str:
    lines = []
    for record in found.of_kind("environment"):
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        flags = f" `{record['flags']}`" if record["flags"] else ""
        lines.append(
            f"{OURS} {record['commit']}{flags}, model {record['model']}, {record['date']}; "
            f"{record['machine']}; {versions}."
        )
    machines = found.of_kind("machine")
    if machines:
        rate, flops = (max(m[key] for m in machines) for key in ("bytes_per_s", "bf16_flops"))
        lines.append(
            f"{machines[0]['threads']} threads read {rate / 1e9:.1f} GB/s and multiply bfloat16 at "
            f"{flops / 1e9:.0f} GFLOP/s (the best pass of all repeats)."
        )
    return "\n".join(lines)


def _targets(found: Findings) -> str:
    lines = ["| target | must be | measured | against | |", "|---|--:|--:|---|---|"]
    for target in TARGETS:
        result = target.measure(found)
        if result is None:
            lines.append(f"| {target.name} | {target.wanted} | | | not measured |")
            continue
        value, against = result
        verdict = "met" if target.is_met(value) else "**missed**"
        lines.append(f"| {target.name} | {target.wanted} | {value:.2f} | {against} | {verdict} |")
    return "\n".join(lines)


#: Heading, key, and how the median is printed.
_COLUMNS = (
    ("latency mean", "latency_mean_s", "{:.2f}"),
    ("p99 s", "latency_p99_s", "{:.2f}"),
    ("TTFT p50", "ttft_p50_ms", "{:.0f}"),
    ("p99 ms", "ttft_p99_ms", "{:.0f}"),
    ("TPOT p50 ms", "tpot_p50_ms", "{:.1f}"),
    ("distinct", "distinct_adapters", "{:.0f}"),
    ("server cores", "server_cpu_share", "{:.2f}"),
    ("client", "client_cpu_share", "{:.2f}"),
)


def _cells(found: Findings) -> str:
    heads = " | ".join(head for head, _, _ in _COLUMNS)
    lines = [
        f"| in flight:adapters:law | server | out tok/s (least to most) | {heads} "
        "| other, most | PSS peak MB | failed | wrong length |",
        "|---|---|--:" + "|--:" * (len(_COLUMNS) + 4) + "|",
    ]
    order = list(dict.fromkeys(cell for _, cell in found.cells))
    for cell in order:
        for (server, of_cell), runs in found.cells.items():
            if of_cell == cell:
                lines.append(_cell_row(found, server, cell, runs))
    return "\n".join(lines)


def _cell_row(found: Findings, server: str, cell: str, runs: list[Record]) -> str:
    rates = [run.get("out_tok_s", 0.0) for run in runs]
    rate = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
    values = []
    for _, key, form in _COLUMNS:
        value = _median(runs, key)
        values.append("" if value is None else form.format(value))
    other = max(run["other_cpu_share"] for run in runs)
    counts = [sum(run[key] for run in runs) for key in ("failed", "mismatched")]
    peak = found.peak_mb(server, cell) or 0
    row = [cell, server, rate, *values, f"{other:.2f}", f"{peak:.0f}", *map(str, counts)]
    return "| " + " | ".join(row) + " |"


def _first_uses(found: Findings) -> str:
    records = found.of_kind("cold")
    if not records:
        return ""
    keys = ("cold_ttft_p50_ms", "warm_ttft_p50_ms", "base_ttft_p50_ms", "extra_ttft_p50_ms")
    lines = [
        "| TTFT p50, ms | first use | second use | base | extra | load call before it |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for server, count in dict.fromkeys((r["server"], r["num_registered"]) for r in records):
        own = [r for r in records if (r["server"], r["num_registered"]) == (server, count)]
        values = [_median(own, key) for key in (*keys, "load_call_p50_ms")]
        shown = " | ".join("" if value is None else f"{value:.1f}" for value in values)
        lines.append(f"| {server}, {count} adapters | {shown} |")
    return "\n".join(lines)


def _problems(found: Findings) -> str:
    lines = [f"- {r['server']}: {r['error']}" for r in found.of_kind("broken")]
    if disturbed := found.of_kind("disturbed"):
        lines.append(f"- {len(disturbed)} runs beside other work are left out")
    for record in (*found.of_kind("cell"), *found.of_kind("cold")):
        where = f"{record['server']}, {record.get('cell', 'first uses')}"
        lines += [f"- {where}: {problem}" for problem in record.get("problems", [])]
    return "\n".join(["Problems:", *dict.fromkeys(lines)]) if lines else ""


def _median(records: Sequence[Record], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return statistics.median(values) if values else None
