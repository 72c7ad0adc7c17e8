"""Changes to a catalogue, each in a process of its own that kills itself: run by `test_kill.py`.

Reads lines of JSON, `[data folder, change, stage, adapter folder]`. For each it forks a process
that makes the change and kills itself without warning (SIGKILL) once it has come to the stage;
then writes the process's exit code, negative for the signal that ended it. A fork, because
importing everything takes seconds; this process itself computes nothing that has threads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from loraplex_server.adapters.registration import Registration
from tests.support.adapters import make_catalog, tiny_base_model

#: What a change exits with that was not killed.
SURVIVED = 3


def main() -> None:
    torch.set_num_threads(1)
    tiny_base_model()
    for line in sys.stdin:
        process_id = os.fork()
        if process_id == 0:
            change(*json.loads(line))
            os._exit(SURVIVED)
        _, status = os.waitpid(process_id, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def change(data_dir: str, change: str, stage: str, folder: str) -> None:
    def at_stage(reached: str) -> None:
        if reached == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    catalog = make_catalog(Path(data_dir), at_stage=at_stage)
    if change in ("upload", "replace"):
        with catalog.new_upload() as upload:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                upload.write_part(name, [Path(folder, name).read_bytes()])
            at_stage("received")
            received = upload.finish()
            catalog.register(Registration("a", replace=change == "replace"), received)
    elif change == "rollback":
        catalog.rollback("a", version=1)
    elif change == "delete":
        catalog.delete("a")
    elif change == "prune":
        catalog.delete(f"a@{catalog.versions('a')[-1].id}")
    at_stage("done")


if __name__ == "__main__":
    main()
