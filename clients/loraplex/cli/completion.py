"""`loraplex completion`: what makes a shell complete commands and options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from typer.completion import get_completion_script  # type: ignore[attr-defined] # from a submodule

from loraplex.cli.terminal import stdout, write


class Shell(StrEnum):
    """The shells that can."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(help="Which shell reads it.")],
) -> None:
    """Write a completion script: eval "$(loraplex completion bash)"."""
    script = get_completion_script(
        prog_name="loraplex", complete_var="_LORAPLEX_COMPLETE", shell=shell.value
    )
    write(stdout(), script)
