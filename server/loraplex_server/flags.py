"""The command line of `loraplex serve`: its flags and its help, made from the settings' fields."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import Field
from typing import Any, NoReturn


class FlagError(Exception):
    """The arguments cannot be parsed; the message says why."""


class _FlagParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def flag_of(setting: str) -> str:
    """Return the flag of a setting: `max_running` is `--max-running`."""
    return "--" + setting.replace("_", "-")


def given_flags(asked: argparse.Namespace, settings: Iterable[str]) -> list[str]:
    """Return those of the server's flags that another command was given, as it takes them."""
    given = {name: getattr(asked, name) for name in settings}
    return [f"{flag_of(name)}={value}" for name, value in given.items() if value is not None]


def flag_parser(settings: Mapping[str, Field[Any]]) -> argparse.ArgumentParser:
    """Return a parser of these flags, by group, with the texts that `--help` shows."""
    parser = _FlagParser(
        prog="loraplex serve",
        usage="%(prog)s [--model MODEL] [--port N] [--config FILE] ...",
        description="Serve one language model and its LoRA adapters with the OpenAI API.",
        epilog="Each flag is also an environment variable (LORAPLEX_MAX_RUNNING) and a key of the "
        "TOML file (max_running). Flags win over variables, variables over the file. Without "
        "a flag: LORAPLEX_API_KEY (api_key), which every request must then bring, and "
        "LORAPLEX_REGISTRY_URL (registry_url), a database of adapters that servers share.",
        formatter_class=_help_format,
        allow_abbrev=False,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this and exit")
    general.add_argument("--version", action="version", version=_version(), help="show the version")
    general.add_argument("--config", metavar="FILE", help="read settings from this TOML file")
    groups = {"general": general}
    for flag, setting in settings.items():
        group = setting.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(
            flag, metavar=setting.metadata["shape"], help=_flag_help(setting)
        )
    return parser


def _help_format(prog: str) -> argparse.HelpFormatter:
    width = min(100, shutil.get_terminal_size().columns)
    return argparse.HelpFormatter(prog, max_help_position=30, width=width)


def _flag_help(setting: Field[Any]) -> str:
    text = str(setting.metadata["help"])
    if "default:" in text:
        return text
    if setting.default is None:
        return f"{text} (default: auto)"
    return f"{text} (default: {_shown(setting.default)})"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"{value >> 20}MiB" if value % 2**30 else f"{value >> 30}GiB"
    return str(value)


def _version() -> str:
    from importlib.metadata import version

    return f"loraplex {version('loraplex')}"
