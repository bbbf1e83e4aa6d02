"""Whose watermark is in these texts: `azeotrope trace answers.jsonl runs/pocket_demo`."""

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.defenses.watermark import Config as WatermarkConfig
from azeotrope.evidence.attribution import Verdict, attribute
from experiment.points import Point, find_point
from gateway.accounts.key_records import KeyRecord
from gateway.accounts.stores import StoreLocation
from workflows.keys import existing_keys

JSON_ENDINGS = {".jsonl", ".ndjson", ".json"}
CONFIGURED = "configured"
"""Stands where a key's id stands: the mark of text that was written without a gateway's key."""
SHOWN = 20
"""Marks that are listed; found ones always are."""


def main(
    file: Path,
    source: str,
    *,
    defense: str | None = None,
    tokenizer: str | None = None,
    share: float | None = None,
    context: int | None = None,
    alarm_rate: float,
    stores: StoreLocation,
) -> None:
    """Print what the mark of every key says about the texts, all of them together.

    Args:
        share, context: None takes those of the source's watermark, or else the defaults.

    Raises:
        ConfigError: if there is no text, no store, or the source is not what served.
    """
    records = existing_keys(stores).list()
    texts = read_texts(file)
    point = find_point(source, defense)
    settings = _settings(point, share, context)
    loaded = _tokenizer(tokenizer or point.checkpoint)
    # Markers of a beginning were not written by the model.
    ids = [loaded.encode(text, add_special_tokens=False) for text in texts]
    marks = {record.id: record.watermark_key for record in records if record.watermark_key}
    marks[CONFIGURED] = settings.key
    try:
        verdicts = attribute(
            ids, marks, share=settings.share, context=settings.context, alarm_rate=alarm_rate
        )
    except ValueError as error:
        raise ConfigError(f"trace: {error}") from None
    console = Console()
    console.print(_table(verdicts, {record.id: record for record in records}))
    said = f"share {settings.share:g}, context {settings.context}"
    console.print(f"{len(texts):,} texts, {len(verdicts)} marks tried ({said})", soft_wrap=True)
    console.print(_conclusion(verdicts, alarm_rate), soft_wrap=True)


def read_texts(path: Path) -> list[str]:
    """Texts of a file: the field `text` of JSON lines, or every line; blank ones are skipped.

    Raises:
        ConfigError: if there is no such file, no text in it, or a row that has none.
    """
    if not path.is_file():
        raise ConfigError(f"no file {path}; give lines of text, or JSON lines with a field `text`")
    try:
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    if path.suffix.lower() in JSON_ENDINGS or (lines and _is_object(lines[0])):
        lines = [_field(path, number, line) for number, line in enumerate(lines, 1)]
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"{path} holds no text; there is nothing to trace")
    return texts


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _field(path: Path, number: int, line: str) -> str:
    place = f"{path}, row {number}"
    try:
        row = json.loads(line)
    except ValueError:
        raise ConfigError(f"{place} is no JSON; each line is an object with a `text`") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is no object; each line is an object with a `text`")
    if not isinstance(row.get("text"), str):
        known = ", ".join(row) or "nothing"
        raise ConfigError(f"{place} has no text in a field `text`; it has {known}")
    return row["text"]


def _settings(point: Point, share: float | None, context: int | None) -> WatermarkConfig:
    found = [dict(part) for part in point.decoding if part["name"] == "watermark"]
    given = {"share": share, "context": context}
    given = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise ConfigError(f"the source has {len(found)} watermarks; no text can tell them apart")
    try:
        return WatermarkConfig.model_validate({**(found[0] if found else {}), **given})
    except ValueError as error:
        raise ConfigError(f"trace: {error}") from None


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return models.load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {name}: {error}") from None


def _table(verdicts: list[Verdict], records: Mapping[str, KeyRecord]) -> Table:
    table = Table(title="marks, the surest first")
    table.add_column("key", no_wrap=True)
    table.add_column("name", overflow="fold")
    for column in ("tokens judged", "z", "corrected p"):
        table.add_column(column, justify="right")
    table.add_column("verdict", no_wrap=True)
    shown = [item for row, item in enumerate(verdicts) if item.found or row < SHOWN]
    for item in shown:
        names = dict.fromkeys(_name(holder, records) for holder in item.holders)
        cells = ("\n".join(item.holders), ", ".join(names), f"{item.detection.scored:,}")
        more = (f"{item.detection.z:.1f}", f"{item.p_value:.2g}", "found" if item.found else "-")
        # Text and not markup: a name may hold brackets.
        table.add_row(*(Text(cell) for cell in (*cells, *more)))
    if len(shown) < len(verdicts):
        table.caption = f"and {len(verdicts) - len(shown)} marks more, none of them found"
    return table


def _name(holder: str, records: Mapping[str, KeyRecord]) -> str:
    return records[holder].name if holder in records else "the source's own mark"


def _conclusion(verdicts: list[Verdict], alarm_rate: float) -> str:
    found = [item for item in verdicts if item.found]
    rate = f"innocent text is laid to anybody with a probability of at most {alarm_rate:g}"
    if found:
        whose = "; ".join(", ".join(item.holders) for item in found)
        return f"[bold]The texts carry the mark of {whose}[/bold] ({rate})."
    if verdicts[0].detection.scored == 0:
        return "[bold]Nobody's mark is found[/bold]: the texts are too short to judge a token."
    return (
        f"[bold]Nobody's mark is found[/bold] ({rate}). That clears nobody: too little text, "
        "paraphrase, or other settings of the watermark hide a mark."
    )
