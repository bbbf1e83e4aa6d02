"""Audit an endpoint for leaks: `azeotrope audit http://127.0.0.1:8000/v1 --key KEY`."""

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from azeotrope.config import ConfigError
from gateway.audit import run


def main(url: str, key: str, model: str | None = None) -> int:
    """Print what every probe found.

    Returns:
        0 if everything held; 1 if something leaked, was accepted that should not be, or is not
        known: an audit that has not seen everything has not passed.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"a URL such as http://127.0.0.1:8000/v1 is needed, got {url!r}")
    console = Console()
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("probes", total=run.count())
            found = run.audit(url, key, model=model, on_done=lambda n: progress.advance(task, n))
    except (ValueError, httpx.HTTPError) as error:
        raise ConfigError(f"audit: {error}") from None
    table = Table("probe", "outcome", "seen")
    colours = {"held": "green", "accepted": "red", "leaked": "bold red", "unclear": "yellow"}
    for item in found:
        # Text and not markup: what a server says may hold brackets.
        outcome = Text(item.outcome, style=colours[item.outcome])
        table.add_row(Text(item.probe), outcome, Text(item.seen))
    console.print(table)
    counts = {name: sum(item.outcome == name for item in found) for name in colours}
    console.print(", ".join(f"{number} {name}" for name, number in counts.items()))
    if counts["unclear"]:
        console.print("nothing is known about what is unclear, so the audit did not pass")
    return int(counts["held"] < len(found))
