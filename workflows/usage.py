"""What each API key used, day by day."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from azeotrope.config import ConfigError
from azeotrope.gateway.keys import KEYS_FILE, KeyStore
from azeotrope.gateway.ledger import LEDGER_FILE, Ledger, SqliteLedger
from azeotrope.gateway.redis_ledger import RedisLedger
from workflows.keys import existing_store


def main(key: str | None, store: Path | None, redis: str | None = None) -> None:
    """Print a table of requests and tokens.

    Args:
        redis: URL of the ledger of a gateway on several nodes; None reads the store's own.

    Raises:
        ConfigError: if there is no store, or no key of this id.
    """
    folder = existing_store(store)
    names = {
        record.id: record.name for record in KeyStore(folder / KEYS_FILE, must_exist=True).list()
    }
    if key is not None and key not in names:
        raise ConfigError(f"no key has the id {key!r}; `azeotrope keys list` shows all")
    ledger: Ledger
    ledger = SqliteLedger(folder / LEDGER_FILE) if redis is None else RedisLedger(redis)
    # What a dead gateway left open would stay open in the table.
    ledger.sweep()
    table = Table(title="usage by day (UTC)")
    table.add_column("day", no_wrap=True)
    table.add_column("key", no_wrap=True)
    table.add_column("name", overflow="fold")
    for column in ("requests", "prompt tokens", "completion tokens", "open"):
        table.add_column(column, justify="right")
    for row in ledger.usage(key):
        counts = (row.requests, row.prompt_tokens, row.completion_tokens, row.open_requests)
        cells = (str(row.day), row.key, names.get(row.key, ""), *(f"{count:,}" for count in counts))
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)
