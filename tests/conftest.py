"""Settings that must be made before anything is imported."""

from __future__ import annotations

import os

# Triton decides when a kernel is defined whether it is compiled or interpreted, and there is no
# GPU here to compile for. `test_aot.py` compiles in processes of its own, without this.
os.environ["TRITON_INTERPRET"] = "1"
# Tests compute little and many run at once; threads that wait for each other cost more than they
# give. Processes that tests start set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
