"""Create, list, revoke and rotate the API keys of a gateway. Commands import heavy modules late."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from azeotrope.config import ConfigError

if TYPE_CHECKING:
    from gateway.accounts.key_records import KeyRecord
    from gateway.accounts.keys import KeyStore
    from gateway.accounts.stores import StoreLocation

DAY_S = 86_400
MOST_DAYS = 3650.0
"""The longest life of a key: ten years."""

app = typer.Typer(
    no_args_is_help=True, help="Create, list, revoke and rotate the API keys of a gateway."
)
StorePath = Annotated[
    Path | None,
    typer.Option(
        "--store", help="folder of keys and quotas (default: $AZEOTROPE_HOME or ~/.azeotrope)"
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis",
        envvar="AZEOTROPE_REDIS_URL",
        help="URL of a Redis for keys and quotas that gateways on several nodes share",
    ),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="id in `azeotrope keys list`")]


def store_location(store: Path | None, redis: str | None) -> "StoreLocation":
    """The stores that the options `--store` and `--redis` name."""
    from gateway.accounts.stores import StoreLocation

    return StoreLocation.of_options(store, redis)


def existing_keys(stores: "StoreLocation") -> "KeyStore":
    """The keys at a location, for commands that must not create a store by mistake.

    Raises:
        ConfigError: if there is no store, or it cannot be opened.
    """
    from gateway.accounts.sqlite_keys import KEYS_FILE
    from gateway.accounts.stores import open_keys

    if stores.redis is not None:
        # `must_exist` also means read-only, so the store is opened again below.
        open_keys(stores, must_exist=True)
    elif not (stores.folder / KEYS_FILE).is_file():
        raise ConfigError(
            f"no keys in {stores.folder}; `azeotrope keys create NAME` begins a store"
        )
    return open_keys(stores)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="name of the customer or program that gets the key")],
    tier: Annotated[
        str, typer.Option(help="tier of the policy, which sets the key's rules and quotas")
    ] = "standard",
    licence: Annotated[
        str,
        typer.Option(help="usage, or distillation, which permits use of the undefended teacher"),
    ] = "usage",
    model: Annotated[
        list[str] | None, typer.Option(help="permitted model; repeatable (default: all)")
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help="chat, completions or metrics; repeatable (default: chat and completions)"
        ),
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option(help="days until the key expires (default: never)")
    ] = None,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """Create a key and print its token once."""
    from gateway.accounts.key_records import ORDINARY
    from gateway.accounts.stores import open_keys

    if expires_days is not None:
        _check_range("--expires-days", expires_days, 0.0, MOST_DAYS)
    record, token = open_keys(store_location(store, redis)).create(
        name,
        tier=tier,
        licence=licence,
        models=model or (),
        features=feature or ORDINARY,
        expires_in_s=None if expires_days is None else expires_days * DAY_S,
    )
    _print_token(record, token)
    if licence == "distillation":
        _note(
            "This licence permits distillation: the key gets the undefended teacher, and its "
            "holder can copy the model."
        )


@app.command("list")
def list_keys(store: StorePath = None, redis: RedisUrl = None) -> None:
    """List all keys. Tokens are not stored and cannot be shown."""
    import time

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    keys = existing_keys(store_location(store, redis)).list()
    # The account is shown where it differs from the id: it says whose key was rotated.
    rotated = any(key.account != key.id for key in keys)
    table = Table(title="keys")
    table.add_column("id", no_wrap=True)  # in one line, so that it can be copied
    for column in ("name", "tier", "licence", "models", "features", "created", "state"):
        table.add_column(column, overflow="fold")
    if rotated:
        table.add_column("account", no_wrap=True)
    for key in keys:
        cells = (key.id, key.name, key.tier, key.licence, ", ".join(key.models) or "all")
        more = (", ".join(key.features), _date(key.created), _state(key, time.time()))
        account = (key.account if key.account != key.id else "",) if rotated else ()
        # Text and not markup: a name may contain brackets.
        table.add_row(*(Text(cell) for cell in (*cells, *more, *account)))
    Console().print(table)


@app.command()
def revoke(
    id: KeyId,
    all: Annotated[
        bool, typer.Option("--all", help="also revoke every other key of the same account")
    ] = False,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """Revoke a key. All gateways refuse it within one second."""
    keys = existing_keys(store_location(store, redis))
    for record in keys.revoke_account(id) if all else [keys.revoke(id)]:
        typer.echo(f"{record.id} ({record.name}) is revoked; gateways refuse it within a second")


def _check_range(option: str, value: float, least: float, most: float) -> None:
    # Written so that NaN does not pass.
    if not least <= value <= most:
        raise ConfigError(f"{option} must be from {least:g} to {most:g}, got {value:g}")


@app.command()
def rotate(
    id: KeyId,
    overlap_hours: Annotated[
        float, typer.Option(help="hours during which the old token also works")
    ] = 0.0,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """Replace a key: print a new token once, with the same rights, and end the old one."""
    _check_range("--overlap-hours", overlap_hours, 0.0, MOST_DAYS * 24)
    keys = existing_keys(store_location(store, redis))
    record, token = keys.rotate(id, overlap_s=overlap_hours * 3600)
    _print_token(record, token)
    _note(f"{id} works for {overlap_hours:g} hours more." if overlap_hours else f"{id} is revoked.")


def _print_token(record: "KeyRecord", token: str) -> None:
    # Only the token goes to standard output, so that a script can capture it.
    typer.echo(token)
    _note(f"This is the token of {record.id} ({record.name}, tier {record.tier}).")
    _note("It is not stored and cannot be shown again: save it now.")
    if record.expires is not None:
        _note(f"It ends on {_date(record.expires)}.")


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _state(key: "KeyRecord", now: float) -> str:
    if key.revoked is not None:
        return f"revoked {_date(key.revoked)}"
    if key.expires is None:
        return "active"
    return f"{'active until' if key.is_active(now) else 'expired'} {_date(key.expires)}"


def _date(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
