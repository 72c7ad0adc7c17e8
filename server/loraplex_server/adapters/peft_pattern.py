"""Module-name patterns of a PEFT configuration, matched without backtracking.

PEFT takes regular expressions from `adapter_config.json` (`rank_pattern`, `alpha_pattern`,
`target_modules`, ...). Handing an uploader's expression to `re` would let one upload freeze the
process: `re` backtracks, and holds the interpreter's lock while it does. Here an expression is
parsed into a tree and matched by sets of positions, in bounded steps, with the answer `re` gives.
What the dialect does not have (look-around, back-references, flags) raises `PatternError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_MAX_PATTERN_LEN: Final = 20_000
_MAX_DEPTH: Final = 40
_MAX_REPEAT: Final = 10_000
#: Compiling a character costs about as much as that many steps of matching.
_COMPILE_STEPS: Final = 10

_ITEM: Final = re.compile(
    r"\\[.\-_/:dDwWsS]|\[\^?[A-Za-z0-9_./:-]+\]|\[\^?(?:\\[dwDW.\-_]|[A-Za-z0-9_./:])+\]"
    r"|[A-Za-z0-9_\-/:@ ,]|\."
)
_REPEAT: Final = re.compile(r"(?:([*+?])|\{([0-9]{1,5})(?:(,)([0-9]{1,5})?)?\})\??(?![*+?{])")
_PLAIN: Final = re.compile(r"(?:[A-Za-z0-9_\-/]|\\?\.)*")


class PatternError(ValueError):
    """The pattern cannot be matched here; the text says why."""


class StepBudget:
    """Bounds the work of all matches for one adapter; owned by its reading."""

    def __init__(self, steps: int = 3_000_000) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise PatternError("takes too long to match; write the module names out")


@dataclass(frozen=True)
class _Item:
    char: re.Pattern[str]


@dataclass(frozen=True)
class _Anchor:
    kind: str


@dataclass(frozen=True)
class _Choice:
    options: tuple[tuple[_Node, ...], ...]


@dataclass(frozen=True)
class _Repeat:
    body: _Node
    least: int
    most: int | None


_Node = _Item | _Anchor | _Choice | _Repeat


class ModulePattern:
    """One compiled pattern; immutable apart from the budget it spends."""

    def __init__(self, pattern: str, budget: StepBudget) -> None:
        """Raises PatternError when the pattern is wrong or outside the dialect."""
        if len(pattern) > _MAX_PATTERN_LEN:
            raise PatternError(f"is longer than {_MAX_PATTERN_LEN} characters")
        self._budget = budget
        budget.spend(_COMPILE_STEPS * len(pattern))
        self._plain: re.Pattern[str] | None = None
        self._tree: _Choice | None = None
        if _PLAIN.fullmatch(pattern):
            # No choice and no repeat, so `re` cannot backtrack beyond the prefix.
            self._plain = re.compile(pattern)
        else:
            self._tree = _Parser(pattern).parse()

    def matches(self, module: str) -> bool:
        """What `re.fullmatch(pattern, module)` says."""
        return self._ends_at_end(module, {0})

    def matches_tail(self, module: str) -> bool:
        r"""What `re.match(rf"(.*\.)?({pattern})$", module)` says: PEFT's `get_pattern_key`."""
        starts = {0} | {at + 1 for at, char in enumerate(module) if char == "."}
        return self._ends_at_end(module, starts)

    def _ends_at_end(self, module: str, starts: set[int]) -> bool:
        if self._plain is not None:
            self._budget.spend(1)
            return any(self._plain.fullmatch(module, start) for start in starts)
        assert self._tree is not None
        return len(module) in self._advance(self._tree, module, starts)

    def _advance(self, node: _Node, text: str, starts: set[int]) -> set[int]:
        """Return where a match of `node` that begins at one of `starts` can end."""
        self._budget.spend(1 + len(starts))
        match node:
            case _Item(char):
                return {at + 1 for at in starts if char.match(text, at)}
            case _Anchor(kind):
                return {at for at in starts if _is_at(kind, text, at)}
            case _Choice(options):
                ends = (self._advance_all(option, text, starts) for option in options)
                return set().union(*ends)
            case _Repeat():
                return self._advance_repeat(node, text, starts)

    def _advance_all(self, nodes: Sequence[_Node], text: str, starts: set[int]) -> set[int]:
        for node in nodes:
            if not starts:
                break
            starts = self._advance(node, text, starts)
        return starts

    def _advance_repeat(self, node: _Repeat, text: str, starts: set[int]) -> set[int]:
        ends = set(starts) if node.least == 0 else set()
        current, count = starts, 0
        while current and (node.most is None or count < node.most):
            following = self._advance(node.body, text, current)
            count += 1
            if following == current:
                return ends | following
            if count >= node.least:
                if following <= ends:
                    break
                ends |= following
            current = following
        return ends


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> _Choice:
        tree = self._choice()
        if self._at < len(self._pattern):
            raise PatternError("has an unbalanced ')'")
        return tree

    def _choice(self) -> _Choice:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PatternError(f"nests more than {_MAX_DEPTH} groups")
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        self._depth -= 1
        return _Choice(tuple(options))

    def _sequence(self) -> tuple[_Node, ...]:
        nodes: list[_Node] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            nodes.append(self._repeated(self._atom()))
        return tuple(nodes)

    def _atom(self) -> _Node:
        for anchor in ("^", "$", r"\b"):
            if self._take(anchor):
                return _Anchor(anchor)
        if self._take("("):
            if self._take("?") and not self._take(":"):
                raise PatternError("uses a '(?' group other than '(?:'; write the names out")
            group = self._choice()
            if not self._take(")"):
                raise PatternError("has an unbalanced '('")
            return group
        found = _ITEM.match(self._pattern, self._at)
        if found is None:
            raise PatternError(f"is not understood at {self._pattern[self._at : self._at + 12]!r}")
        self._at = found.end()
        if "--" in found.group():
            raise PatternError("holds '--' in a character class")
        try:
            return _Item(re.compile(found.group()))
        except re.error as error:
            raise PatternError(f"is not a regular expression: {error}") from error

    def _repeated(self, body: _Node) -> _Node:
        found = _REPEAT.match(self._pattern, self._at)
        if found is None:
            return body
        if isinstance(body, _Anchor):
            raise PatternError("repeats an anchor")
        self._at = found.end()
        least, most = _repeat_bounds(found)
        if max(least, most or 0) > _MAX_REPEAT or (most is not None and most < least):
            raise PatternError(f"has a repeat count that is wrong or above {_MAX_REPEAT}")
        return _Repeat(body, least, most)

    def _take(self, token: str) -> bool:
        if self._pattern.startswith(token, self._at):
            self._at += len(token)
            return True
        return False


def _is_at(anchor: str, text: str, at: int) -> bool:
    if anchor == "^":
        return at == 0
    if anchor == "$":
        return at == len(text)
    return _is_word(text[at - 1 : at]) != _is_word(text[at : at + 1])


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _repeat_bounds(found: re.Match[str]) -> tuple[int, int | None]:
    mark, least, comma, most = found.groups()
    if mark is not None:
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[mark]
    if comma is None:
        return int(least), int(least)
    return int(least), int(most) if most else None
