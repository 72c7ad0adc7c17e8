"""Reading the settings: flags, environment variables and a TOML file.

Flags (`--max-step-tokens`), environment variables (`LORAPLEX_MAX_STEP_TOKENS`) and TOML keys
(`max_step_tokens`) derive from the names of `Config`'s fields, and the first of these that names a
setting decides. A name that no setting has is an error, never ignored.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

from loraplex_server.config import Config, ConfigError
from loraplex_server.flags import FlagError, flag_of, flag_parser

ENV_PREFIX: Final = "LORAPLEX_"

#: Variables of the SDK and the CLI; the server leaves them alone.
FOREIGN_ENV: Final = frozenset({"LORAPLEX_BASE_URL"})

#: What Kubernetes tells every pod about a service named "loraplex".
_SERVICE_LINK: Final = re.compile(
    r"LORAPLEX_SERVICE_HOST|LORAPLEX_SERVICE_PORT(_\w+)?|LORAPLEX_PORT_\d+_\w+"
)
_SERVICE_URL: Final = re.compile(r"(tcp|udp|sctp)://.*")

#: Settings without a flag: every user of the machine can read a program's arguments.
SECRETS: Final = frozenset({"api_key", "registry_url"})
#: Settings whose wrong values no message repeats: a password may be in them.
_NOT_SHOWN: Final = SECRETS | {"otlp_endpoint"}

_SETTINGS: Final[Mapping[str, Field[Any]]] = {f.name: f for f in fields(Config)}


def load_config(argv: Sequence[str], env: Mapping[str, str], *, needs_files: bool = True) -> Config:
    """Assemble the settings from flags > environment > the TOML file of --config > defaults.

    Args:
        needs_files: False for whoever uses the registry and no adapter's file.

    Raises:
        ConfigError: a flag, variable or key is unknown or its value impossible.
        SystemExit: `--help` or `--version` was given.
    """
    config = _assemble("flag", _read_flags(argv), env)
    if needs_files:
        _check_files(config)
    return config


def config_of_arguments(
    arguments: Mapping[str, Any], env: Mapping[str, str], *, elsewhere: Mapping[str, str]
) -> Config:
    """Assemble the settings the same way, from arguments by name in the place of flags.

    Args:
        arguments: values as TOML or flags have them.
        elsewhere: settings that somebody else decides here, and by which means.

    Raises:
        ConfigError: as `load_config`; or one of `elsewhere` is given, in whatever way.
    """
    for name in arguments:
        if name in SECRETS:
            raise ConfigError(f"{name} is a secret; set {_spelling('env', name)} instead")
        if name not in (*_SETTINGS, "config"):
            _refuse_unknown("argument", name, _SETTINGS)
    config = _assemble("argument", dict(arguments), env, elsewhere)
    _check_files(config)
    return config


def _assemble(
    kind: str,
    given: dict[str, Any],
    env: Mapping[str, str],
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> Config:
    from_env = _read_env(env)
    path = given.pop("config", None) or from_env.pop("config", None)
    from_file = _read_toml(Path(path).expanduser()) if path else {}
    values: dict[str, Any] = {}
    for source, raw_values in (("file", from_file), ("env", from_env), (kind, given)):
        for name, raw in raw_values.items():
            where = _spelling(source, name)
            if name in elsewhere:
                raise ConfigError(f"{where} has no effect here; use {elsewhere[name]}")
            values[name] = _parse(name, raw, where=where)
    config = Config(**values)
    _check_together(config)
    return config


def _check_files(config: Config) -> None:
    if config.registry_url is not None and config.blob_url is None:
        raise ConfigError(
            "registry_url is shared by several servers, and so needs blob_url: a place for files "
            "that all of them reach, such as --blob-url s3://bucket/folder"
        )


def _check_together(config: Config) -> None:
    """Refuse settings that others make meaningless."""
    if config.tenant_weights and config.order != "vtc":
        raise ConfigError(f"tenant_weights means nothing with order {config.order}; use vtc")


def _parse(name: str, raw: Any, where: str) -> Any:
    try:
        return _SETTINGS[name].metadata["parse"](raw)
    except ValueError as error:
        given = "" if name in _NOT_SHOWN else f", not {raw!r}"
        raise ConfigError(f"{where} must be {error}{given}") from None


def _spelling(source: str, name: str) -> str:
    if source == "flag":
        return flag_of(name)
    if source == "env":
        return ENV_PREFIX + name.upper()
    if source == "argument":
        return f"argument {name}"
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


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    visible = {name: s for name, s in _SETTINGS.items() if name not in SECRETS}
    parser = flag_parser({_spelling("flag", name): s for name, s in visible.items()})
    try:
        found, unknown = parser.parse_known_args(list(argv))
    except FlagError as error:
        raise ConfigError(str(error)) from None
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        _refuse_unknown("argument", unknown[0].partition("=")[0], known)
    return {name: value for name, value in vars(found).items() if value is not None}
