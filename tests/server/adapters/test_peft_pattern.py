"""Patterns without backtracking give the answers of `re`, and always in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loraplex_server.adapters.peft_pattern import ModulePattern, PatternError, StepBudget

MODULES = [
    f"model.layers.{layer}.{linear}"
    for layer in (0, 1, 10, 31)
    for linear in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.down_proj")
]

atoms = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a.]", "0", "1", "_", r"[\d]", "[0-9]"]
)
marks = st.sampled_from(["", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{0,2}", "{2,3}?"])
pieces = st.builds("".join, st.tuples(atoms, marks))
sequences = st.lists(pieces, max_size=4).map("".join)


def groups(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    options = st.lists(inner, min_size=1, max_size=3).map("|".join)
    grouped = st.builds(lambda body, mark: f"(?:{body}){mark}", options, marks)
    return st.lists(st.one_of(grouped, pieces), max_size=3).map("".join)


patterns = st.one_of(
    st.recursive(sequences, groups, max_leaves=6),
    st.builds(lambda a, b: f"^{a}$|{b}$", sequences, sequences),
    st.builds(lambda a, b: rf"{a}\b{b}", sequences, sequences),
)


@given(patterns, st.text("ab.01_", max_size=7))
def test_a_pattern_matches_what_re_matches(pattern: str, text: str):
    compiled = ModulePattern(pattern, StepBudget())
    assert compiled.matches(text) == bool(re.fullmatch(pattern, text))
    assert compiled.matches_tail(text) == bool(re.match(rf"(.*\.)?({pattern})$", text))


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "layers.1.self_attn.q_proj",
        r"layers\.1\..*",
        "^model.layers.0.*",
        r".*\.(0|1)\.mlp\.(gate|down)_proj",
        r"(?:.*?(?:language|text|model).*?(?:self_attn|attn|mlp).*?(?:q_proj|down_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
        "proj",
        "",
        "model.layers.[0-9]+.mlp",
    ],
)
def test_usual_patterns_match_as_in_peft(pattern: str):
    compiled = ModulePattern(pattern, StepBudget())
    for module in MODULES:
        assert compiled.matches_tail(module) == (get_pattern_key([pattern], module) == pattern)
        assert compiled.matches(module) == bool(re.fullmatch(pattern, module))


@pytest.mark.parametrize(
    "pattern",
    ["(a", "a)", "*a", "a**", "(?=a)", "(?i)a", r"\1", "[b-a]", "[a", "a{2,1}", "a{99999}", "^*",
     "a*+", "é", "[a--b]", "(" * 60 + ")" * 60, "a" * 30_000, "\\"],
)  # fmt: skip
def test_what_the_dialect_lacks_is_refused(pattern: str):
    with pytest.raises(PatternError):
        ModulePattern(pattern, StepBudget())


@pytest.mark.parametrize(
    "pattern", ["(.+)+x", "((.*)*)*x", "(.|m|o)*y", "(m|m)" * 8 + "(.|.)*" * 8 + "x", "((a+)+)+b"]
)
def test_patterns_made_to_backtrack_end_soon(pattern: str):
    started = time.thread_time()  # of this thread's own, whoever else computes
    compiled = ModulePattern(pattern, StepBudget())
    assert not any(compiled.matches(module) for module in MODULES)
    assert time.thread_time() - started < 2


def test_the_budget_ends_what_would_take_too_long():
    compiled = ModulePattern("(" * 30 + "a+" + ")+" * 30, StepBudget(steps=100_000))
    with pytest.raises(PatternError, match="too long to match"):
        compiled.matches("a" * 60)
