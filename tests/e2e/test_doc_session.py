"""What runs the blocks of the documentation notices what a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.doc_pages import Block, Page
from tests.support.doc_session import BlockError, DocSession
from tests.support.http_server import Reply, serve

PAGE = """
# One `page`

See [there](#one-page), [nothing](gone.md).

<!-- server: LORAPLEX_API_KEY=lp-x --max-queued 8 -->

```bash run
first=1; export SECOND=2; mkdir sub; cd sub
```

```python run
import os
found = os.environ["SECOND"], os.getcwd()
```

```bash show only an example
false
```

```bash run
test "$first" = 1 && test "$(basename "$PWD")" = sub
```

```python run
assert found[0] == "2" and found[1].endswith("/sub")
```

## One `page`
"""


@pytest.fixture
def page(tmp_path: Path) -> Page:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return Page(path)


@pytest.fixture
def session(tmp_path: Path):
    folder = tmp_path / "home"
    folder.mkdir()
    with serve(lambda request: Reply({}, status=200 if request.path == "/ok" else 404)) as server:
        port = int(server.url.rpartition(":")[2])
        env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with DocSession(folder, env, {"8000": port}) as session:
            yield session


def block(text: str, language: str = "bash") -> Block:
    return Block(Page(Path(__file__)), 1, language, ("run",), text)


def test_a_page_is_read_with_its_blocks_server_links_and_anchors(page):
    assert [b.language for b in page.blocks if b.is_run] == ["bash", "python", "bash", "python"]
    assert [b.reason for b in page.blocks if not b.is_run] == ["only an example"]
    assert page.server == ({"LORAPLEX_API_KEY": "lp-x"}, ["--max-queued", "8"])
    assert list(page.links) == ["#one-page", "gone.md"]
    assert page.anchors == {"one-page", "one-page-1"}


def test_variables_folders_and_names_last_to_the_end_of_the_page(page, session):
    for each in page.blocks:
        if each.is_run:
            session.run(each)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("false\ntrue", "bash"),
        ("echo $nothing_of_this_name", "bash"),
        ("false | cat", "bash"),
        ("if", "bash"),
        ("curl localhost:8000/gone", "bash"),
        ("curl -fs localhost:8000/gone", "bash"),
        ("sleep 100 & exit 3", "bash"),
        ("raise SystemExit", "python"),
        ("1 +", "python"),
    ],
)
def test_what_goes_wrong_in_a_block_fails_and_shows_the_block(session, text, language):
    with pytest.raises(BlockError) as caught:
        session.run(block(text, language))
    assert text.partition("localhost")[0] in str(caught.value)
    assert "test_doc_session.py:1" in str(caught.value)


def test_what_goes_well_does_not(session):
    session.run(block("curl localhost:8000/ok; curl -fsS localhost:8000/ok; ! false"))


def test_what_a_page_leaves_running_ends_with_it(tmp_path):
    with DocSession(tmp_path, {"PATH": os.environ["PATH"]}, {}) as session:
        session.run(block("sleep 1000 & echo $! >pid"))
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True).stdout.strip(
        b" \nZ"
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
