"""The interactive chat: reads lines, runs the slash commands, asks everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.console import Console

from loraplex.cli.conversation import Conversation
from loraplex.cli.models import pick_model
from loraplex.cli.problems import explain
from loraplex.cli.terminal import write
from loraplex.client import Client
from loraplex.errors import LoraplexError

HELP = """\
/model NAME  go on with another model or adapter
/models      list them
/reset       forget the conversation
/help        show this
/quit        leave (or Ctrl-D)
Ctrl-C stops an answer."""


class Repl:
    """One interactive session. Owned by the terminal's thread."""

    def __init__(
        self,
        client: Client,
        conversation: Conversation,
        console: Console,
        read_line: Callable[[str], str],
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._console = console
        self._read_line = read_line
        self._is_over = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/model": self._switch,
            "/models": self._list,
            "/reset": self._reset,
            "/help": lambda _: self._say(HELP),
            "/quit": self._quit,
        }

    def run(self) -> None:
        """Go on until /quit or Ctrl-D."""
        self._say(f"Talking to {self._conversation.model}. /help shows the commands.")
        while not self._is_over:
            try:
                line = self._read_line(f"{self._conversation.model}> ").strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
                self._say("Ctrl-D or /quit leaves.")
                continue
            self._handle(line)

    def _handle(self, line: str) -> None:
        try:
            if line.startswith("/"):
                word, _, rest = line.partition(" ")
                self._commands.get(word, self._unknown)(rest.strip())
            elif line:
                self._ask(line)
        except LoraplexError as error:
            self._say(f"error: {explain(error)}", style="red")

    def _ask(self, line: str) -> None:
        try:
            timing = self._conversation.ask(line, partial(write, self._console, end=""))
        finally:
            self._console.print()
        self._say(f"{timing}")

    def _switch(self, name: str) -> None:
        if not name:
            self._say(f"/model NAME; now: {self._conversation.model}")
            return
        self._conversation.model = pick_model(self._client, name)

    def _list(self, _: str) -> None:
        for model in self._client.models.list():
            mark = "*" if model.id == self._conversation.model else " "
            write(self._console, f"{mark} {model.id}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._say("The conversation starts anew.")

    def _quit(self, _: str) -> None:
        self._is_over = True

    def _unknown(self, _: str) -> None:
        self._say("No such command; /help shows them.")

    def _say(self, text: str, style: str = "dim") -> None:
        write(self._console, text, style=style)
