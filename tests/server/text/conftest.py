from __future__ import annotations

import pytest

from loraplex_server.text.vocabulary import Vocabulary
from tests.support.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(make_tokenizer())
