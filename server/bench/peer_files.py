"""Write what other servers read: the model as a folder, adapters, and both for llama.cpp.

The embedded model is one GGUF file of quantised weights, which others read in other ways or not at
all. So every server gets the same numbers in bfloat16: a folder (`model`), PEFT adapters of ranks
8, 16, 32 and 64 (`adapters`), and with llama.cpp's sources `model.gguf` and `gguf`. What is there
is kept. The converters want `gguf`, `sentencepiece` and `pyyaml` beside what loraplex needs.

    python server/bench/peer_files.py --out DIR [--adapters 512] [--llama-cpp SOURCES]
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import torch
from peer_adapters import write_missing
from transformers import AutoModelForCausalLM

from loraplex_server.model.source import ModelSource, resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=512, help="how many")
    parser.add_argument("--llama-cpp", type=Path, help="its sources, for its converters")
    options = parser.parse_args()
    model, adapters = options.out / "model", options.out / "adapters"
    if not model.exists():
        write_model(resolve_model(None), model)
    write_missing(adapters, model, options.adapters)
    if options.llama_cpp:
        convert(options.llama_cpp, options.out, options.adapters)


def write_model(source: ModelSource, folder: Path) -> None:
    """Save the model in bfloat16, with its tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(
        str(source.path.parent), gguf_file=source.path.name, dtype=torch.float32
    )
    config = loaded.config
    # One that was read from GGUF counts as quantised and refuses to be saved.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    fresh.load_state_dict(loaded.state_dict(), strict=False)
    fresh.tie_weights()
    config.dtype = torch.bfloat16
    fresh.bfloat16().save_pretrained(folder)
    source.load_tokenizer().save_pretrained(folder)


def convert(sources: Path, folder: Path, num_adapters: int) -> None:
    """Run llama.cpp's converters, all adapters in this process: each start takes seconds."""
    model, adapters, out = folder / "model", folder / "adapters", folder / "gguf"
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    out.mkdir(exist_ok=True)
    if not (folder / "model.gguf").exists():
        _run(sources / "convert_hf_to_gguf.py", model, folder / "model.gguf")
    for path in sorted(adapters.iterdir())[:num_adapters]:
        target = out / f"{path.name}.gguf"
        if not target.exists():
            _run(sources / "convert_lora_to_gguf.py", path, target, "--base", str(model))


def _run(script: Path, source: Path, target: Path, *options: str) -> None:
    partial = target.with_suffix(".part")
    arguments = [str(source), "--outfile", str(partial), "--outtype", "bf16", *options]
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
    partial.rename(target)


if __name__ == "__main__":
    main()
