"""What a page of the documentation holds: headings, links and blocks, with their lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]

#: Of blocks that a reader would copy into a shell or a program.
LANGUAGES = ("bash", "python")

_SERVER = re.compile(r"<!--\s*server:(.*?)-->", re.DOTALL)
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*=")
_ID = re.compile(r"""<a\s+(?:id|name)=["']([^"']+)["']""")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its fence, counted from 1."""

    page: Page
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def is_run(self) -> bool:
        """Whether the runner executes it."""
        return self.words == ("run",)

    @property
    def reason(self) -> str:
        """Why it is only shown; empty where the fence does not say."""
        return " ".join(self.words[1:]) if self.words[:1] == ("show",) else ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Page:
    """One Markdown file; `str` of it is its path in the repository."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of shell and Python, in order."""
        return [
            Block(self, token.map[0] + 1, language, tuple(words), token.content)
            for token in self._tokens
            if token.type == "fence" and token.map
            for language, *words in [token.info.split() or [""]]
            if language in LANGUAGES
        ]

    @property
    def server(self) -> tuple[dict[str, str], list[str]]:
        """The variables and flags of the server that the page's blocks talk to."""
        found = _SERVER.search(self.text)
        words = shlex.split(found[1]) if found else []
        variables = [word for word in words if _VARIABLE.match(word)]
        flags = [word for word in words if not _VARIABLE.match(word)]
        return dict(word.split("=", 1) for word in variables), flags

    @property
    def anchors(self) -> set[str]:
        """What `#...` may name: headings as GitHub spells them, and explicit ids."""
        found = set(_ID.findall(self.text))
        for before, token in zip(self._tokens, self._tokens[1:], strict=False):
            if before.type == "heading_open":
                slug = _slug(_plain(token))
                count = 0
                while (anchor := f"{slug}-{count}" if count else slug) in found:
                    count += 1
                found.add(anchor)
        return found

    @property
    def links(self) -> Iterator[str]:
        """The targets of all links and images."""
        for token in self._tokens:
            for child in token.children or ():
                target = child.attrGet("href") or child.attrGet("src")
                if target is not None:
                    yield str(target)


def _plain(heading: Token) -> str:
    children = heading.children or []
    return "".join(child.content for child in children if child.type in ("text", "code_inline"))


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def all_pages() -> list[Page]:
    """Every page that readers see, by path."""
    folders = [ROOT / "docs", ROOT / "docker", ROOT / "clients"]
    paths = [path for folder in folders for path in folder.rglob("*.md")]
    return [Page(path) for path in sorted([*ROOT.glob("*.md"), *paths])]
