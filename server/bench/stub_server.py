"""The product's API process over an engine process that computes nothing. Run by `bench_http`.

Everything is the product's own but the core in the engine process: application, web server,
catalogue, tokenizer, `ProcessEngine` and the loop that steps the core.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from stub_engine import build_stub

from loraplex_server import __main__ as product
from loraplex_server import build
from loraplex_server.engine.process_handle import ProcessEngine
from loraplex_server.model.source import resolve_model
from loraplex_server.text.vocabulary import Vocabulary


def words(vocabulary: Vocabulary, num: int) -> tuple[int, ...]:
    """Return tokens that are one blank and letters each, so that texts can be counted."""
    texts = ((i, vocabulary.token_bytes(i)) for i in range(1000, len(vocabulary), 13))
    found = [i for i, text in texts if text[:1] == b" " and text[1:].isalpha() and text.isascii()]
    return tuple(found[:num])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--pace-s", type=float, required=True)
    options, flags = parser.parse_known_args()
    token_ids = words(Vocabulary(resolve_model(None).load_tokenizer()), 500)
    core = functools.partial(
        build_stub, log_path=options.log, pace_s=options.pace_s, token_ids=token_ids
    )
    build.build_engine_handle = lambda config, facts: ProcessEngine(core)
    sys.exit(product.main(flags))


if __name__ == "__main__":
    main()
