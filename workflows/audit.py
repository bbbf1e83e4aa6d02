"""Audit an endpoint for leaks: `azeotrope audit http://127.0.0.1:8000/v1 --key KEY`."""

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from azeotrope.config import ConfigError
from gateway.audit import run


def main(url: str, key: str, model: str | None = None) -> int:
    """Print the outcome of every probe.

    Returns:
        0 if all probes held, else 1. An unclear outcome counts as a failure too, because an audit
        that has not seen everything has not passed.

    Raises:
        ConfigError: if the URL is malformed, or the endpoint cannot be audited.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"a URL such as http://127.0.0.1:8000/v1 is needed, got {url!r}")
    if not key.strip():
        raise ConfigError("no key to audit with; give --key KEY, or set AZEOTROPE_KEY")
    console = Console()
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("probes", total=run.count())
            results = run.audit(url, key, model=model, on_done=lambda n: progress.advance(task, n))
    except (ValueError, httpx.HTTPError) as error:
        raise ConfigError(f"audit: {error}") from None
    table = Table("probe", "outcome", "seen")
    colours = {"held": "green", "accepted": "red", "leaked": "bold red", "unclear": "yellow"}
    for result in results:
        # Plain text instead of markup, because a server's own words may contain brackets.
        outcome = Text(result.outcome, style=colours[result.outcome])
        table.add_row(Text(result.probe), outcome, Text(result.seen))
    console.print(table)
    counts = {name: sum(result.outcome == name for result in results) for name in colours}
    console.print(", ".join(f"{number} {name}" for name, number in counts.items()))
    if counts["unclear"]:
        console.print("unclear probes were not answered, so the audit did not pass")
    return int(counts["held"] < len(results))
