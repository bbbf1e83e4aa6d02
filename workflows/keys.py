"""Make, show and end the API keys of a gateway. Heavy imports happen inside the commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gateway.accounts.key_records import KeyRecord
    from gateway.accounts.keys import Keys

DAY_S = 86_400

app = typer.Typer(no_args_is_help=True, help="Make, show and end the API keys of a gateway.")
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
        help="URL of the Redis of keys and quotas, if gateways on several nodes share one",
    ),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="as `azeotrope keys list` shows it")]


def existing_keys(store: Path | None, redis: str | None) -> "Keys":
    """The keys that `--store` or `--redis` names, where it makes no sense to begin new ones.

    Raises:
        ConfigError: if nobody has begun a store there, or it cannot be opened.
    """
    from azeotrope.config import ConfigError
    from gateway.accounts.sqlite_keys import KEYS_FILE
    from gateway.accounts.stores import default_store, open_keys

    folder = store or default_store()
    if redis is not None:
        open_keys(folder, redis, must_exist=True)
    elif not (folder / KEYS_FILE).is_file():
        raise ConfigError(f"no keys in {folder}; `azeotrope keys create NAME` begins a store")
    return open_keys(folder, redis)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="whose key it is")],
    tier: Annotated[str, typer.Option(help="rules and quotas, by their name in the policy")] = (
        "standard"
    ),
    licence: Annotated[
        str, typer.Option(help="usage, or distillation: the undefended teacher")
    ] = "usage",
    model: Annotated[
        list[str] | None, typer.Option(help="permitted model, may be repeated (default: all)")
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option(help="chat or completions, may be repeated (default: both)")
    ] = None,
    expires_days: Annotated[float | None, typer.Option(help="days (default: no end)")] = None,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """Make a key and print its token, once."""
    from gateway.accounts.key_records import ORDINARY
    from gateway.accounts.stores import default_store, open_keys

    record, token = open_keys(store or default_store(), redis).create(
        name,
        tier=tier,
        licence=licence,
        models=model or (),
        features=feature or ORDINARY,
        expires_in_s=None if expires_days is None else expires_days * DAY_S,
    )
    _show(record, token)
    if licence == "distillation":
        _note(
            "This licence permits distillation: the key gets the undefended teacher, and whoever "
            "holds it can copy the model."
        )


@app.command("list")
def show(store: StorePath = None, redis: RedisUrl = None) -> None:
    """Show all keys, but no token: tokens are not stored."""
    import time

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    keys = existing_keys(store, redis).list()
    # The ids of rotated keys do not say whose they are.
    rotated = any(key.account != key.id for key in keys)
    table = Table(title="keys")
    table.add_column("id", no_wrap=True)  # to be copied whole
    for column in ("name", "tier", "licence", "models", "features", "created", "state"):
        table.add_column(column, overflow="fold")
    if rotated:
        table.add_column("account", no_wrap=True)
    for key in keys:
        cells = (key.id, key.name, key.tier, key.licence, ", ".join(key.models) or "all")
        more = (", ".join(key.features), _date(key.created), _state(key, time.time()))
        account = (key.account if key.account != key.id else "",) if rotated else ()
        # Text and not markup: a name may hold brackets.
        table.add_row(*(Text(cell) for cell in (*cells, *more, *account)))
    Console().print(table)


@app.command()
def revoke(
    id: KeyId,
    all: Annotated[
        bool, typer.Option("--all", help="and every other key of the same account")
    ] = False,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """End a key. Gateways learn of it within a second."""
    keys = existing_keys(store, redis)
    for record in keys.revoke_account(id) if all else [keys.revoke(id)]:
        typer.echo(f"{record.id} ({record.name}) is revoked; gateways refuse it within a second")


@app.command()
def rotate(
    id: KeyId,
    overlap_hours: Annotated[
        float, typer.Option(help="how long the old token works beside the new one")
    ] = 0.0,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """Give a key's rights to a new token, print it once, and end the old one."""
    record, token = existing_keys(store, redis).rotate(id, overlap_s=overlap_hours * 3600)
    _show(record, token)
    _note(f"{id} works for {overlap_hours:g} hours more." if overlap_hours else f"{id} is revoked.")


def _show(record: "KeyRecord", token: str) -> None:
    # The token alone goes to the standard output, so that a script can take it.
    typer.echo(token)
    _note(f"This is the token of {record.id} ({record.name}, tier {record.tier}).")
    _note("It is not stored and cannot be shown again: keep it now.")
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
