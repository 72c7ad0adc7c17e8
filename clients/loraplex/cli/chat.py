"""`loraplex chat`: one answer for a script, or a conversation in a terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from typing import Annotated

import typer

from loraplex.cli.conversation import Conversation
from loraplex.cli.models import pick_model
from loraplex.cli.repl import Repl
from loraplex.cli.settings import open_client
from loraplex.cli.terminal import stderr, stdout, write
from loraplex.errors import UsageError
from loraplex.options import ChatOptions

STOPPED_EXIT_CODE = 130  # what shells expect of a program ended by Ctrl-C


def chat(
    ctx: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Ask this (and what is piped in), print the answer and leave."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model or an adapter; default: the base.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer, in tokens.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 always gives the likeliest answer.")
    ] = None,
) -> None:
    """Talk to the model or to an adapter; answers appear as they are generated."""
    options: ChatOptions = {"max_tokens": max_tokens, "temperature": temperature}
    prompt = _with_piped(prompt)
    if prompt is not None and not prompt.strip():
        raise UsageError("there is nothing to ask: give a prompt, or pipe one in")
    with open_client(ctx) as client:
        name = pick_model(client, model)
        conversation = Conversation(client, name, system=system, options=options)
        if prompt is not None:
            _answer_once(conversation, prompt)
            return
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and history
        Repl(client, conversation, stdout(), input).run()


def _with_piped(prompt: str | None) -> str | None:
    """Return the prompt with what was piped in behind it; None in a terminal without a prompt."""
    if sys.stdin is None or sys.stdin.isatty():
        return prompt
    piped = sys.stdin.read()
    if prompt is None:
        return piped
    return f"{prompt}\n\n{piped}" if piped.strip() else prompt


def _answer_once(conversation: Conversation, prompt: str) -> None:
    """Write the answer to stdout and how long it took to stderr."""
    console = stdout()
    try:
        timing = conversation.ask(prompt, partial(write, console, end=""))
    finally:
        console.print()
    write(stderr(), str(timing), style="dim")
    if timing.finish_reason is None:
        raise typer.Exit(STOPPED_EXIT_CODE)
