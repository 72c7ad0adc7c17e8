"""The pages of the documentation hold together: blocks, links, the index, the settings."""

from __future__ import annotations

from dataclasses import fields
from urllib.parse import unquote

import pytest

from loraplex_server.config import Config
from tests.support.doc_pages import ROOT, Page, all_pages

DOCS = [page for page in all_pages() if page.path.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", DOCS, ids=str)
def test_each_block_is_run_or_says_why_not(page: Page):
    for block in page.blocks:
        assert block.is_run or block.reason, (
            f"{block}: a block of {block.language} is `run`, or `show` and the reason; "
            "see CONTRIBUTING.md"
        )


@pytest.mark.parametrize("page", all_pages(), ids=str)
def test_relative_links_and_anchors_lead_somewhere(page: Page):
    for link in page.links:
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.is_relative_to(ROOT), f"{page}: {link} leaves the repository"
        assert target.exists(), f"{page}: there is no {link}"
        if anchor and target.suffix == ".md":
            assert anchor in Page(target).anchors, f"{page}: no heading {link}"


def test_the_index_links_every_page():
    index = Page(ROOT / "docs" / "README.md")
    linked = {(index.path.parent / link).resolve() for link in index.links if "://" not in link}
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert path in linked or path == index.path, f"docs/README.md does not link {path.name}"


@pytest.mark.parametrize("setting", [field.name for field in fields(Config)])
def test_every_setting_is_in_some_page(setting: str):
    flag, variable = "--" + setting.replace("_", "-"), "LORAPLEX_" + setting.upper()
    spellings = (f"`{setting}`", f"`{flag}`", f"`{variable}`")
    assert any(spelling in page.text for page in DOCS for spelling in spellings), (
        f"the docs do not tell of the setting {setting}"
    )
