"""`python -m loraplex_server.keys_command`; also `loraplex keys`. Needs no server.

It works on the database: so the first key can be made before any server runs, and a lost one be
replaced by whoever has the data folder. A running server sees the change within two seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Final

from loraplex_server.adapters.audit_log import Actor
from loraplex_server.adapters.errors import AdapterError
from loraplex_server.config import Config, ConfigError
from loraplex_server.config_sources import load_config
from loraplex_server.flags import flag_of, given_flags
from loraplex_server.tenants.api_key import ApiKey, KeyWish
from loraplex_server.tenants.errors import TenantError
from loraplex_server.tenants.key_database import open_key_store
from loraplex_server.tenants.key_store import KeyStore
from loraplex_server.tenants.principal import Role

_ABOUT: Final = (
    "Make, list and revoke API keys, in the data folder or the shared registry of a server. Once "
    "there is a key, every request needs one. Exit status: 0 done, 1 not possible, 2 asked wrongly."
)
#: Settings of the server that say where its database is; `registry_url` comes from the environment.
_SETTINGS: Final = ("config", "data_dir")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_PAGE: Final = 1000

_OPEN: Final = "no key was ever made: a server on this data needs none\n"
_LOCKED: Final = (
    "all were revoked, and the server answers nobody: `loraplex keys create` makes another, "
    "`loraplex keys revoke --all-and-open` ends the need of keys\n"
)

_Command = Callable[[KeyStore, Config, argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked and return the exit code."""
    asked = _parser().parse_args(argv)
    run: _Command = asked.run
    try:
        config = load_config(given_flags(asked, _SETTINGS), os.environ, needs_files=False)
        with open_key_store(config) as store:
            run(store, config, asked)
    except ConfigError as error:
        return _fail(error, 2)
    except (AdapterError, TenantError) as error:
        return _fail(error, 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loraplex keys", description=_ABOUT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="make a key, and print its secret, once")
    create.add_argument("--name", required=True, help="for people: whose it is, or what for")
    create.add_argument(
        "--role",
        required=True,
        choices=[role.value for role in Role],
        help="user: generate; uploader: and the tenant's adapters; admin: everything",
    )
    create.add_argument("--tenant", default="", help="whose adapters and account; admins need none")
    create.add_argument("--expires-in", type=_seconds, metavar="TIME", help="30d, 12h, 90m or 45s")
    create.add_argument("--quiet", action="store_true", help="print the secret and nothing else")
    create.set_defaults(run=_create)
    listing = commands.add_parser("list", help="list keys, without their secrets")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list)
    revoke = commands.add_parser("revoke", help="end a key for good")
    what = revoke.add_mutually_exclusive_group(required=True)
    what.add_argument("id", nargs="?", metavar="KEY_ID", help="as `list` shows it")
    what.add_argument(
        "--all-and-open",
        action="store_true",
        help="end all keys and forget them: the server then needs none any more",
    )
    revoke.set_defaults(run=_revoke)
    for command in (create, listing, revoke):
        for name in _SETTINGS:
            command.add_argument(flag_of(name), help="as of `loraplex serve`")
    return parser


def _create(store: KeyStore, config: Config, asked: argparse.Namespace) -> None:
    wish = KeyWish(asked.name, Role(asked.role), asked.tenant, asked.expires_in)
    key, secret = store.create(wish, Actor(), has_other_admin=config.api_key is not None)
    if not asked.quiet:
        of = f" of the tenant {key.tenant}" if key.tenant else ""
        sys.stderr.write(
            f"made {key.key_id}: {key.role.value}{of}\n"
            "This is its secret, which is kept nowhere else and not shown again:\n"
        )
    sys.stdout.write(f"{secret}\n")


def _list(store: KeyStore, config: Config, asked: argparse.Namespace) -> None:
    keys = list(_all_keys(store))
    if asked.json:
        sys.stdout.write(json.dumps([key.as_json() for key in keys], indent=2) + "\n")
        return
    rows = [("ID", "ROLE", "TENANT", "EXPIRES", "LAST USED", "NAME")]
    for key in keys:
        times = _time(key.expires, "never"), _time(key.last_used, "never")
        rows.append((key.key_id, key.role.value, key.tenant or "-", *times, key.name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    if not keys and config.api_key is None:
        sys.stderr.write(_LOCKED if store.read().is_any else _OPEN)
    if config.api_key is not None:
        sys.stderr.write("and the setting api_key (LORAPLEX_API_KEY), if the server has it too\n")


def _revoke(store: KeyStore, config: Config, asked: argparse.Namespace) -> None:
    if asked.all_and_open:
        num_keys = store.forget_all(Actor())
        sys.stderr.write(f"revoked {num_keys} keys; the server needs none any more\n")
        if config.api_key is not None:
            sys.stderr.write("but the setting api_key, which is still there\n")
        return
    key = store.revoke(asked.id, Actor())
    sys.stderr.write(f"revoked {key.key_id} ({key.name}); running servers know within 2 seconds\n")


def _all_keys(store: KeyStore) -> Iterator[ApiKey]:
    page = store.list(limit=_PAGE)
    yield from page
    while len(page) == _PAGE:
        page = store.list(limit=_PAGE, after=page[-1].key_id)
        yield from page


def _time(unix_s: int | None, otherwise: str) -> str:
    if unix_s is None:
        return otherwise
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M")


def _seconds(text: str) -> int:
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit() and unit in _UNITS):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 30d, 12h, 90m or 45s")
    return int(number) * _UNITS[unit]


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"loraplex keys: {error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
