"""Every setting of the server: its name, type, default and help, in one table.

The fields of `Config` are the table; flags (`--max-step-tokens`), environment variables
(`LORAPLEX_MAX_STEP_TOKENS`) and TOML keys (`max_step_tokens`) derive from their names, and the
first of these that names a setting decides. A name that no setting has is an error, never ignored.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NoReturn

ENV_PREFIX: Final = "LORAPLEX_"

#: Variables of the SDK and the CLI; the server leaves them alone.
FOREIGN_ENV: Final = frozenset({"LORAPLEX_BASE_URL"})

#: What Kubernetes tells every pod about a service named "loraplex".
_SERVICE_LINK: Final = re.compile(
    r"LORAPLEX_SERVICE_HOST|LORAPLEX_SERVICE_PORT(_\w+)?|LORAPLEX_PORT_\d+_\w+"
)
_SERVICE_URL: Final = re.compile(r"(tcp|udp|sctp)://.*")

#: Settings without a flag: every user of the machine can read a program's arguments.
SECRETS: Final = frozenset({"api_key"})

Parser = Callable[[Any], Any]


class ConfigError(Exception):
    """A setting is unknown or has an impossible value; the message names it and where it was."""


def _text(raw: Any) -> str:
    if not isinstance(raw, str) or not raw:
        raise ValueError("a non-empty text")
    return raw


def _secret(raw: Any) -> str:
    key = raw.strip() if isinstance(raw, str) else ""
    if not key or not all("!" <= char <= "~" for char in key):
        raise ValueError("a text of printable ASCII characters without spaces")
    return str(key)


def _folder(raw: Any) -> Path:
    return Path(_text(raw)).expanduser().absolute()


def _choice(*options: str) -> Parser:
    def parse(raw: Any) -> str:
        if raw not in options:
            raise ValueError("one of " + ", ".join(options))
        return str(raw)

    return parse


def _integer(low: int, high: int | None = None) -> Parser:
    expected = f"a whole number of at least {low}" + (f", at most {high}" if high else "")

    def parse(raw: Any) -> int:
        if isinstance(raw, bool) or not re.fullmatch(r"[+-]?\d+", str(raw)):
            raise ValueError(expected)
        value = int(raw)
        if value < low or (high is not None and value > high):
            raise ValueError(expected)
        return value

    return parse


def _seconds(raw: Any) -> float:
    try:
        value = math.nan if isinstance(raw, bool) else float(raw)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError("a number of seconds above 0")
    return value


_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def _size(raw: Any) -> int:
    """Parse a number of bytes such as `1073741824`, `512MiB` or `1.5 GB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", str(raw).strip().lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError("a size such as 512MiB or 2GB")
    return size


def _or_auto(parse: Parser) -> Parser:
    """Accept `auto` as well, which becomes None."""

    def parse_or_auto(raw: Any) -> Any:
        if raw == "auto":
            return None
        try:
            return parse(raw)
        except ValueError as error:
            raise ValueError(f"auto, or {error}") from None

    return parse_or_auto


def _setting(parse: Parser, default: Any, group: str, help_text: str, shape: str = "N") -> Any:
    metadata = {"parse": parse, "group": group, "help": help_text, "shape": shape}
    if parse is _secret:
        return field(default=default, repr=False, metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_data_dir() -> Path:
    """Return `$XDG_DATA_HOME/loraplex` where that is set, else `~/.loraplex`."""
    if xdg := os.environ.get("XDG_DATA_HOME"):
        return Path(xdg) / "loraplex"
    return Path.home() / ".loraplex"


@dataclass(frozen=True)
class Config:
    """All settings, checked; None stands for `auto`."""

    model: str | None = _setting(
        _text,
        None,
        "model",
        "folder, GGUF file or hub id (default: SmolLM2-135M-Instruct)",
        "MODEL",
    )
    served_model_name: str | None = _setting(
        _text, None, "model", "the base model's name in the API (default: derived)", "NAME"
    )
    dtype: str = _setting(
        _choice("auto", "float32", "bfloat16"), "auto", "model", "arithmetic of the model", "TYPE"
    )
    device: str = _setting(
        _choice("auto", "cpu", "cuda"), "auto", "model", "where it runs; auto: a GPU if any", "TYPE"
    )
    max_model_len: int | None = _setting(
        _or_auto(_integer(1)), None, "model", "most tokens of prompt and answer; auto: the model's"
    )
    threads: int = _setting(_integer(0), 0, "model", "CPU threads of the engine; 0: all cores")

    page_tokens: int = _setting(
        _integer(1, 1024), 16, "memory", "tokens whose keys and values fill one page"
    )
    pool_bytes: int | None = _setting(
        _or_auto(_size),
        None,
        "memory",
        "size of the page pool, e.g. 512MiB; auto: by memory",
        "SIZE",
    )
    max_step_tokens: int | None = _setting(
        _or_auto(_integer(1)), None, "memory", "most tokens of one step; auto: 512, on a GPU 2048"
    )
    max_running: int | None = _setting(
        _or_auto(_integer(1)), None, "memory", "most sequences of one step; auto: 64, on a GPU 256"
    )

    data_dir: Path = _setting(  # noqa: RUF009 - returns a field, as dataclasses.field does
        _folder, default_data_dir, "adapters", "where adapters are stored", "FOLDER"
    )
    max_adapter_rank: int = _setting(
        _integer(1, 256), 256, "adapters", "refuse adapters of a higher rank"
    )
    max_upload_bytes: int = _setting(
        _size, 2**30, "adapters", "refuse larger uploads, e.g. 1GiB", "SIZE"
    )

    host: str = _setting(_text, "127.0.0.1", "service", "address to listen on", "HOST")
    port: int = _setting(_integer(0, 65535), 8000, "service", "port to listen on; 0: any free one")
    api_key: str | None = _setting(
        _secret, None, "service", "refuse requests without this key", "KEY"
    )
    request_timeout_s: float = _setting(
        _seconds, 600.0, "service", "end a request after so many seconds", "S"
    )
    max_queued: int = _setting(
        _integer(0), 1024, "service", "answer 429 when more sequences wait than this"
    )
    shutdown_grace_s: int = _setting(
        _integer(0), 20, "service", "let running requests finish so long when stopping", "S"
    )
    log_level: str = _setting(
        _choice("debug", "info", "warning", "error"), "info", "service", "how much to log", "LEVEL"
    )


_SETTINGS: Final[Mapping[str, Field[Any]]] = {f.name: f for f in fields(Config)}


def load_config(argv: Sequence[str], env: Mapping[str, str]) -> Config:
    """Assemble the settings from flags > environment > the TOML file of --config > defaults.

    Raises:
        ConfigError: a flag, variable or key is unknown or its value impossible.
        SystemExit: `--help` or `--version` was given.
    """
    flags = _read_flags(argv)
    from_env = _read_env(env)
    path = flags.pop("config", None) or from_env.pop("config", None)
    from_file = _read_toml(Path(path).expanduser()) if path else {}
    values: dict[str, Any] = {}
    for source, raw_values in (("file", from_file), ("env", from_env), ("flag", flags)):
        for name, raw in raw_values.items():
            values[name] = _parse(name, raw, where=_spelling(source, name))
    return Config(**values)


def _parse(name: str, raw: Any, where: str) -> Any:
    try:
        return _SETTINGS[name].metadata["parse"](raw)
    except ValueError as error:
        given = "" if name in SECRETS else f", not {raw!r}"
        raise ConfigError(f"{where} must be {error}{given}") from None


def _spelling(source: str, name: str) -> str:
    if source == "flag":
        return "--" + name.replace("_", "-")
    if source == "env":
        return ENV_PREFIX + name.upper()
    return f"key `{name}` of the configuration file"


def _refuse_unknown(what: str, given: str, known: Iterable[str]) -> NoReturn:
    nearest = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; see --help"
    raise ConfigError(f"unknown {what} {given}{hint}")


def _read_env(env: Mapping[str, str]) -> dict[str, Any]:
    known = {_spelling("env", name): name for name in (*_SETTINGS, "config")}
    found = {}
    for variable, value in env.items():
        if not variable.startswith(ENV_PREFIX) or _is_foreign(variable, value):
            continue
        if variable not in known:
            _refuse_unknown("environment variable", variable, known)
        found[known[variable]] = value
    return found


def _is_foreign(variable: str, value: str) -> bool:
    """Whether a variable with our prefix is not meant for the server."""
    if variable in FOREIGN_ENV or _SERVICE_LINK.fullmatch(variable):
        return True
    return variable == "LORAPLEX_PORT" and _SERVICE_URL.fullmatch(value) is not None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for key in content:
        if key not in _SETTINGS:
            _refuse_unknown(f"key in {path}:", key, _SETTINGS)
    return content


class _FlagParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    parser = _flag_parser()
    found, unknown = parser.parse_known_args(list(argv))
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        _refuse_unknown("argument", unknown[0].partition("=")[0], known)
    return {name: value for name, value in vars(found).items() if value is not None}


def _flag_parser() -> argparse.ArgumentParser:
    parser = _FlagParser(
        prog="loraplex serve",
        usage="%(prog)s [--model MODEL] [--port N] [--config FILE] ...",
        description="Serve one language model and its LoRA adapters with the OpenAI API.",
        epilog="Each flag is also an environment variable (LORAPLEX_MAX_RUNNING) and a key of the "
        "TOML file (max_running). Flags win over variables, variables over the file. Without "
        "a flag: LORAPLEX_API_KEY (api_key), which every request must then bring.",
        formatter_class=_help_format,
        allow_abbrev=False,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this and exit")
    general.add_argument("--version", action="version", version=_version(), help="show the version")
    general.add_argument("--config", metavar="FILE", help="read settings from this TOML file")
    groups = {"general": general}
    for name, setting in _SETTINGS.items():
        if name in SECRETS:
            continue
        group = setting.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(
            _spelling("flag", name), metavar=setting.metadata["shape"], help=_flag_help(setting)
        )
    return parser


def _help_format(prog: str) -> argparse.HelpFormatter:
    width = min(100, shutil.get_terminal_size().columns)
    return argparse.HelpFormatter(prog, max_help_position=30, width=width)


def _flag_help(setting: Field[Any]) -> str:
    text = str(setting.metadata["help"])
    if setting.default is MISSING:
        return f"{text} (default: ~/.loraplex)"
    if setting.default is None:
        return text if "default:" in text else f"{text} (default: auto)"
    return f"{text} (default: {_shown(setting.default)})"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"{value >> 20}MiB" if value % 2**30 else f"{value >> 30}GiB"
    return str(value)


def _version() -> str:
    from importlib.metadata import version

    return f"loraplex {version('loraplex')}"
