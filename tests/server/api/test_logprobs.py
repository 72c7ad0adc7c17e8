from __future__ import annotations

import json
import math

import pytest

from loraplex_scheduler.plan import SampledToken, TokenLogprobs
from loraplex_server.api.json_text import compact
from loraplex_server.api.logprobs import CompletionLogprobs, chat_logprobs


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_write_shows_as_the_least(vocabulary, value):
    token = SampledToken(5, TokenLogprobs(value, ((5, value), (6, -0.5))))
    [entry] = json.loads(compact(chat_logprobs(vocabulary, [token])))["content"]
    assert entry["logprob"] == -9999.0
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-9999.0, -0.5]
    writer = CompletionLogprobs(vocabulary, skip_special_tokens=True)
    written = json.loads(compact(writer.write([token])))
    assert written["token_logprobs"] == [-9999.0]
    assert sorted(written["top_logprobs"][0].values()) == [-9999.0, -0.5]
