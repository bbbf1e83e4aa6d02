"""Show what each API key used, day by day."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from azeotrope.config import ConfigError
from gateway.accounts.key_records import UNDEFENDED
from gateway.accounts.stores import StoreLocation, open_ledger
from workflows.keys import existing_keys


def main(key: str | None, stores: StoreLocation) -> None:
    """Print a table of requests and tokens; the keys of one customer share a row.

    Requests to the undefended teacher, which need a licence, have a row of their own.

    Args:
        key: the id of any key of one customer; None shows all.

    Raises:
        ConfigError: if there is no store, or no key of this id.
    """
    records = existing_keys(stores).list()
    accounts = {record.id: record.account for record in records}
    names = {record.account: record.name for record in records}
    if key is not None and key not in accounts:
        raise ConfigError(f"no key has the id {key!r}; `azeotrope keys list` shows all")
    ledger = open_ledger(stores)
    # Requests of a dead gateway would otherwise remain open in the table.
    ledger.sweep()
    table = Table(title="usage by day (UTC)")
    table.add_column("day", no_wrap=True)
    table.add_column("account", no_wrap=True)
    table.add_column("name", overflow="fold")
    for column in ("requests", "prompt tokens", "completion tokens", "open"):
        table.add_column(column, justify="right")
    selected = None if key is None else {accounts[key], accounts[key] + UNDEFENDED}
    for row in ledger.usage():
        if selected is not None and row.key not in selected:
            continue
        counts = (row.requests, row.prompt_tokens, row.completion_tokens, row.open_requests)
        name = names.get(row.key.removesuffix(UNDEFENDED), "")
        cells = (str(row.day), row.key, name, *(f"{count:,}" for count in counts))
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)
