"""One cell of `bench_peers.py` on PEFT's mixed batch, in a process of its own.

So its memory and its threads are its own, and end with it. Batches are static: a request's time
counts from its batch's start, and a batch ends with its longest answer. Prints one JSON line.

    python server/bench/peft_cell.py --model DIR --adapters DIR --cell 32:32 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from peer_cells import Cell
from peer_servers import adapter_name
from peft_baseline import PeftMixedBatch
from process_tree import ProcessTree, machine_cpu_s
from workload import summarize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder or a GGUF file")
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--cell", type=Cell.parse, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    work = options.cell.work(options.seed)
    used = sorted({item.adapter for item in work if item.adapter is not None})
    folders = [options.adapters / adapter_name(index) for index in used]
    peft = PeftMixedBatch(options.model, folders, torch.bfloat16)
    work = [
        replace(item, adapter=None if item.adapter is None else used.index(item.adapter))
        for item in work
    ]
    peft.run([replace(item, num_output=2) for item in work[:2]], 2)
    machine_s, own_s = machine_cpu_s(), time.process_time()
    timings, wall_s = peft.run(work, options.cell.concurrency)
    own_s, machine_s = time.process_time() - own_s, machine_cpu_s() - machine_s
    figures = summarize(timings, wall_s) | {
        "completed": len(timings),
        "failed": 0,
        "mismatched": 0,
        "distinct_adapters": len(used),
        "wall_s": wall_s,
        "server_cpu_share": own_s / wall_s,
        "client_cpu_share": 0.0,
        "other_cpu_share": (machine_s - own_s) / wall_s,
        "pss_peak_mb": ProcessTree(os.getpid()).pss_bytes() / 1e6,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
