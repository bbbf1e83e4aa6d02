"""Find whose watermark texts carry: `azeotrope attribute answers.jsonl runs/pocket_demo`."""

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.config import build as build_config
from azeotrope.defenses.watermark import Config as WatermarkConfig
from azeotrope.defenses.watermark import Watermark
from azeotrope.evidence.attribution import Verdict, attribute
from experiment.points import Point, find_point
from gateway.accounts.key_records import KeyRecord
from gateway.accounts.stores import StoreLocation
from workflows.keys import existing_keys

JSON_ENDINGS = {".jsonl", ".ndjson", ".json"}
CONFIGURED = "configured"
"""In place of a key's id: the mark of text that was written without a gateway's key."""
LISTED = 20
"""Marks in the table; detected ones are always listed."""


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
    """Print what the mark of every key says about the texts of a file, all of them together.

    Args:
        share, context: None takes those of the source's watermark, or the defaults without one.

    Raises:
        ConfigError: if there is no text, no key store, no such source, or a setting does not fit.
    """
    records = existing_keys(stores).list()
    texts = read_texts(file)
    point = find_point(source, defense)
    settings = _settings(point, share, context)
    loaded = _tokenizer(tokenizer or point.checkpoint)
    # Without special tokens: the model did not write the one that begins a text.
    ids = [loaded.encode(text, add_special_tokens=False) for text in texts]
    marks = {record.id: record.watermark_key for record in records if record.watermark_key}
    marks[CONFIGURED] = settings.key
    try:
        verdicts = attribute(
            ids,
            {holder: _with_key(settings, key) for holder, key in marks.items()},
            alarm_rate=alarm_rate,
        )
    except ValueError as error:
        raise ConfigError(f"attribute: {error}") from None
    console = Console()
    console.print(_table(verdicts, {record.id: record for record in records}))
    watermark = f"share {settings.share:g}, context {settings.context}"
    console.print(
        f"{len(texts):,} texts, {len(verdicts)} marks tried ({watermark})", soft_wrap=True
    )
    console.print(_conclusion(verdicts, alarm_rate), soft_wrap=True)


def read_texts(path: Path) -> list[str]:
    """Texts of a file: the field `text` of JSON lines, or every line; blank ones are skipped.

    Raises:
        ConfigError: if there is no such file, no text in it, or a row without a text.
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
        raise ConfigError(f"{path} holds no text; there is nothing to attribute")
    return texts


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _field(path: Path, number: int, line: str) -> str:
    row_name = f"{path}, row {number}"
    try:
        row = json.loads(line)
    except ValueError:
        raise ConfigError(f"{row_name} is no JSON; each line is an object with a `text`") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{row_name} is no object; each line is an object with a `text`")
    if not isinstance(row.get("text"), str):
        fields = ", ".join(row) or "no field"
        raise ConfigError(f"{row_name} has no text in a field `text`; it has {fields}")
    return row["text"]


def _settings(point: Point, share: float | None, context: int | None) -> WatermarkConfig:
    watermarks = [dict(part) for part in point.decoding if part["name"] == "watermark"]
    if len(watermarks) > 1:
        raise ConfigError(
            f"the source has {len(watermarks)} watermarks; no text can tell them apart"
        )
    settings = watermarks[0] if watermarks else {"name": "watermark"}
    options = {"share": share, "context": context}
    settings |= {name: value for name, value in options.items() if value is not None}
    return build_config(WatermarkConfig, settings, source="attribute")


def _with_key(settings: WatermarkConfig, key: str) -> Watermark:
    return Watermark(WatermarkConfig.model_validate({**settings.dump(), "key": key}))


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return models.load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {name}: {error}") from None


def _table(verdicts: list[Verdict], records: Mapping[str, KeyRecord]) -> Table:
    table = Table(title="marks, the smallest p first")
    table.add_column("key", no_wrap=True)
    table.add_column("name", overflow="fold")
    for column in ("tokens judged", "z", "corrected p"):
        table.add_column(column, justify="right")
    table.add_column("verdict", no_wrap=True)
    listed = [verdict for row, verdict in enumerate(verdicts) if verdict.detected or row < LISTED]
    for verdict in listed:
        names = dict.fromkeys(_name(holder, records) for holder in verdict.holders)
        cells = (
            "\n".join(verdict.holders),
            ", ".join(names),
            f"{verdict.detection.scored:,}",
            f"{verdict.detection.z:.1f}",
            f"{verdict.p_value:.2g}",
            "found" if verdict.detected else "-",
        )
        # Text and not markup: a name may hold brackets.
        table.add_row(*(Text(cell) for cell in cells))
    if len(listed) < len(verdicts):
        table.caption = f"and {len(verdicts) - len(listed)} more marks, none of them found"
    return table


def _name(holder: str, records: Mapping[str, KeyRecord]) -> str:
    return records[holder].name if holder in records else "the source's own mark"


def _conclusion(verdicts: list[Verdict], alarm_rate: float) -> str:
    detected = [verdict for verdict in verdicts if verdict.detected]
    rate = f"unmarked text is attributed to any key with a probability of at most {alarm_rate:g}"
    if detected:
        holders = "; ".join(", ".join(verdict.holders) for verdict in detected)
        return f"[bold]The texts carry the mark of {holders}[/bold] ({rate})."
    if verdicts[0].detection.scored == 0:
        return "[bold]No mark is found[/bold]: the texts are too short to judge a token."
    return (
        f"[bold]No mark is found[/bold] ({rate}). This does not clear any key: too little text, "
        "paraphrasing, or other settings of the watermark hide a mark."
    )
