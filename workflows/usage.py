"""What each API key used, day by day."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from azeotrope.config import ConfigError
from gateway.accounts.key_records import UNDEFENDED
from gateway.accounts.stores import default_store, open_ledger
from workflows.keys import existing_keys


def main(key: str | None, store: Path | None, redis: str | None = None) -> None:
    """Print a table of requests and tokens; the keys of one customer share a row.

    What a licence took of the undefended teacher has a row of its own.

    Args:
        key: the id of any key of one customer; None shows all.
        redis: URL of the Redis of gateways on several nodes; None reads the files of the store.

    Raises:
        ConfigError: if there is no store, or no key of this id.
    """
    records = existing_keys(store, redis).list()
    accounts = {record.id: record.account for record in records}
    names = {record.account: record.name for record in records}
    if key is not None and key not in accounts:
        raise ConfigError(f"no key has the id {key!r}; `azeotrope keys list` shows all")
    ledger = open_ledger(store or default_store(), redis)
    # What a dead gateway left open would stay open in the table.
    ledger.sweep()
    table = Table(title="usage by day (UTC)")
    table.add_column("day", no_wrap=True)
    table.add_column("account", no_wrap=True)
    table.add_column("name", overflow="fold")
    for column in ("requests", "prompt tokens", "completion tokens", "open"):
        table.add_column(column, justify="right")
    wanted = None if key is None else {accounts[key], accounts[key] + UNDEFENDED}
    for row in ledger.usage():
        if wanted is not None and row.key not in wanted:
            continue
        counts = (row.requests, row.prompt_tokens, row.completion_tokens, row.open_requests)
        name = names.get(row.key.removesuffix(UNDEFENDED), "")
        cells = (str(row.day), row.key, name, *(f"{count:,}" for count in counts))
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)
