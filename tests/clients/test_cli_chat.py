from __future__ import annotations

import io
import os
import re
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loraplex import Client, StreamError
from loraplex.cli.app import app
from loraplex.cli.conversation import Conversation, Timing
from loraplex.cli.repl import Repl
from tests.clients.tiny_loraplex import TinyLoraplex
from tests.support.http_server import Reply, serve


@pytest.fixture
def tiny():
    tiny = TinyLoraplex()
    tiny.add("pirate")
    tiny.add("sql-writer")
    return tiny


@pytest.fixture
def server(tiny):
    with serve(tiny.answer) as running:
        yield running


@pytest.fixture
def chat(server):
    def run(*args: str, stdin: str = ""):
        return CliRunner().invoke(app, ["--base-url", server.url, "chat", *args], input=stdin)

    return run


@pytest.fixture
def talk(server):
    """Run an interactive session on the given lines; an exception among them is raised."""

    def run(*lines: str | type[BaseException], model: str = "base") -> str:
        typed = iter(lines)

        def read_line(prompt: str) -> str:
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        shown = io.StringIO()
        console = Console(file=shown, highlight=False)
        with Client(base_url=server.url, max_retries=0) as client:
            Repl(client, Conversation(client, model), console, read_line).run()
        return shown.getvalue()

    return run


def test_a_prompt_is_answered_once_by_the_base(chat, server):
    result = chat("hello you")
    assert (result.exit_code, result.stdout) == (0, "base heard 1: hello you\n")
    assert re.fullmatch(r"5 tokens, [\d.]+ tokens/s, first after [\d.]+ s\n", result.stderr)
    assert server.requests[-1].json()["stream_options"] == {"include_usage": True}


def test_a_prompt_can_be_piped_in(chat):
    assert chat(stdin="piped\n").stdout == "base heard 1: piped\n\n"


def test_what_is_piped_in_comes_behind_the_prompt(chat, server):
    assert chat("sum this up", stdin="line 1\nline 2\n").exit_code == 0
    [turn] = server.requests[-1].json()["messages"]
    assert turn["content"] == "sum this up\n\nline 1\nline 2\n"
    chat("alone", stdin="\n")
    assert server.requests[-1].json()["messages"][0]["content"] == "alone"


def test_options_reach_the_server(chat, server):
    result = chat(
        "hi", "--model", "pirate", "--system", "be brief", "--max-tokens", "5", "--temperature", "0"
    )
    assert result.stdout == "pirate heard 2: hi\n"
    sent = server.requests[-1].json()
    assert sent["messages"][0] == {"role": "system", "content": "be brief"}
    assert (sent["max_tokens"], sent["temperature"]) == (5, 0)


def test_an_empty_prompt_is_an_error(chat):
    assert "nothing to ask" in chat(stdin="").stderr


def test_an_unknown_model_is_an_error_with_the_closest_names(chat):
    result = chat("hi", "--model", "pirat")
    assert result.exit_code == 1
    assert result.stderr == "error: no model 'pirat'; did you mean pirate?\n"
    assert "`loraplex models` lists them" in chat("hi", "--model", "zzz").stderr


def test_a_tenants_own_short_name_is_the_servers_to_know(chat, tiny):
    tiny.unlisted.add("/v1/models/parrot")
    assert chat("hi", "--model", "parrot").stdout == "parrot heard 1: hi\n"


def test_an_answer_that_breaks_off_is_an_error(chat, tiny):
    failure = b'data: {"error": {"message": "the engine died"}}\n\n'
    tiny.failing["POST", "/v1/chat/completions"] = Reply(pieces=[failure])
    result = chat("hi")
    assert (result.exit_code, result.stderr) == (1, "error: the engine died\n")


def test_control_characters_in_an_answer_do_not_reach_the_terminal(chat):
    assert chat("a\x1b[31m\tb\ac").stdout == "base heard 1: a[31m\tbc\n"


def test_a_conversation_keeps_its_turns_until_it_is_reset(talk):
    shown = talk("one", "two", "/reset", "three")
    assert "base heard 1: one" in shown
    assert "base heard 3: two" in shown
    assert "base heard 1: three" in shown
    assert shown.count("tokens/s") == 3


def test_the_model_can_be_switched_in_the_middle(talk):
    shown = talk("ahoy", "/model pirate", "again", "/model sqlwriter", "/model", "/models")
    assert "pirate heard 3: again" in shown
    assert "error: no model 'sqlwriter'; did you mean sql-writer?" in shown
    assert "/model NAME; now: pirate" in shown
    assert "  base\n* pirate\n  sql-writer\n" in shown


def test_the_session_goes_on_after_an_error(talk, tiny):
    error = Reply({"error": {"message": "too many"}}, 429)
    tiny.failing["POST", "/v1/chat/completions"] = error
    shown = talk("one", "/help", "/nonsense", "", KeyboardInterrupt, "/quit", "unread")
    assert "error: too many; wait a little and try again" in shown
    assert "Ctrl-C stops an answer." in shown
    assert "No such command" in shown
    assert "Ctrl-D or /quit leaves." in shown
    assert "unread" not in shown


def test_a_question_without_an_answer_is_forgotten(server, tiny):
    with Client(base_url=server.url, max_retries=0) as client:
        conversation = Conversation(client, "base")
        tiny.failing["POST", "/v1/chat/completions"] = Reply(pieces=[])
        with pytest.raises(StreamError):
            conversation.ask("lost", lambda piece: None)
        tiny.failing.clear()
        conversation.ask("kept", lambda piece: None)
    assert server.requests[-1].json()["messages"] == [{"role": "user", "content": "kept"}]


def test_a_stopped_answer_is_kept_as_far_as_it_came(server):
    def stop(piece: str) -> None:
        if piece == " heard":
            raise KeyboardInterrupt

    with Client(base_url=server.url) as client:
        conversation = Conversation(client, "base")
        timing = conversation.ask("one", stop)
        assert (timing.num_tokens, str(timing).endswith("stopped")) == (2, True)
        conversation.ask("two", lambda piece: None)
    assert [turn["content"] for turn in server.requests[-1].json()["messages"]] == [
        "one",
        "base heard",
        "two",
    ]


def test_timing_counts_tokens_after_the_first(server):
    now = iter([10.0, 12.0, 13.0, 14.0, 15.0])
    with Client(base_url=server.url) as client:
        conversation = Conversation(client, "base", clock=lambda: next(now))
        timing = conversation.ask("x", lambda piece: None)
    assert str(timing) == "4 tokens, 1.0 tokens/s, first after 2.00 s"


@pytest.mark.parametrize(
    ("timing", "words"),
    [
        (Timing(1, 0.5, 0.0, "stop"), "1 token, first after 0.50 s"),
        (Timing(0, 0.0, 0.0, None), "0 tokens, stopped"),
        (
            Timing(3, 1.0, 1.0, "length"),
            "3 tokens, 2.0 tokens/s, first after 1.00 s, cut off at the token limit",
        ),
    ],
)
def test_timing_reads_as_words(timing, words):
    assert str(timing) == words


IN_A_TERMINAL = (
    # Whoever starts the tests in the background has Ctrl-C ignored, and programs inherit that.
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "import os; os.close(os.open(os.ttyname(0), os.O_RDWR))\n"  # take it as controlling terminal
    "from loraplex.cli.main import main; main()"
)


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *args: str) -> None:
        self._fd, inside = os.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, *args],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(inside)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, text: str, timeout_s: float = 30.0) -> None:
        """Read until the text is shown after what was waited for before."""
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            left_s = deadline - time.monotonic()
            is_ready = left_s > 0 and select.select([self._fd], [], [], left_s)[0]
            assert is_ready, f"{text!r} is not in {self.shown!r}"
            try:
                self.shown += os.read(self._fd, 65536).decode(errors="replace")
            except OSError as error:  # the program has ended
                raise AssertionError(self.shown) from error
        self.shown = self.shown.partition(text)[2]

    def close(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self._fd)
        return code


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(tiny, server):
    tiny.slow_s = 0.05
    terminal = Terminal("--base-url", server.url, "chat")
    terminal.wait_for("base> ")
    terminal.type("word " * 200 + "\n")
    terminal.wait_for("base heard 1: word")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    terminal.wait_for("base> ")
    tiny.slow_s = 0.0
    terminal.type("/model pirate\n")
    terminal.wait_for("pirate> ")
    terminal.type("bye\n")
    terminal.wait_for("pirate heard 3: bye")
    terminal.wait_for("pirate> ")
    terminal.type("\x04")
    assert terminal.close() == 0
