"""The console script `azeotrope`: one command a workflow; heavy imports happen inside them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from workflows.keys import RedisUrl, StorePath, store_location
from workflows.keys import app as keys

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model's outputs useful to read and poor to distil, and prove it.",
)
app.add_typer(keys, name="keys")
ConfigName = Annotated[str, typer.Argument(help="a shipped configuration or a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")]


@app.command()
def pipeline(config: ConfigName, overrides: Overrides = None) -> None:
    """Defend a teacher, rob it, and report what the defense was worth."""
    from workflows.pipeline import main as run

    run(config, overrides or [])


@app.command()
def validate(config: ConfigName, overrides: Overrides = None) -> None:
    """Check a configuration, without a network, and say what a run would do."""
    from workflows.validate import main as run

    run(config, overrides or [])


@app.command()
def defend(config: ConfigName, overrides: Overrides = None) -> None:
    """Train and export defended teachers, without attacking them."""
    from workflows.defend import main as run

    run(config, overrides or [])


@app.command()
def generate(config: ConfigName, overrides: Overrides = None) -> None:
    """Let a teacher write traces to Parquet."""
    from workflows.generate import main as run

    run(config, overrides or [])


@app.command()
def attack(
    config: ConfigName,
    traces: Annotated[str, typer.Argument(help="a folder of trace files")],
    overrides: Overrides = None,
) -> None:
    """Train students on traces that you have, and examine them."""
    from workflows.attack import main as run

    run(config, traces, overrides or [])


@app.command()
def ablate(
    config: ConfigName,
    setting: Annotated[
        str, typer.Argument(help="strength, rank, layer, kd_weight, temperature (tau), or a path")
    ],
    values: Annotated[str, typer.Argument(help="two or more, with commas between them")],
    overrides: Overrides = None,
) -> None:
    """Vary one setting, and draw what it does to the teacher and to its thieves."""
    from workflows.ablate import main as run

    run(config, setting, values, overrides or [])


@app.command()
def evaluate(
    config: ConfigName,
    model: Annotated[str, typer.Argument(help="pocket/NAME, a checkpoint folder or a hub name")],
    overrides: Overrides = None,
) -> None:
    """Examine any checkpoint on the test problems."""
    from workflows.evaluate import main as run

    run(config, model, overrides or [])


@app.command()
def usage(
    key: Annotated[str | None, typer.Option(metavar="ID", help="of one key alone")] = None,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """Show what each API key used, day by day."""
    from workflows.usage import main as run

    run(key, store_location(store, redis))


@app.command()
def serve(
    source: Annotated[str, typer.Argument(help="a run, a checkpoint's folder, or pocket/NAME")],
    overrides: Overrides = None,
    policy: Annotated[str | None, typer.Option(help="a YAML file of tiers and limits")] = None,
    write: Annotated[
        str | None, typer.Option(help="write a file for `serve deploy` instead of serving")
    ] = None,
    redis: RedisUrl = None,
) -> None:
    """Serve a defended teacher behind the gateway, until it is interrupted."""
    from workflows.serve import main as run

    run(source, overrides or [], policy, write, redis)


@app.command()
def audit(
    url: Annotated[str, typer.Argument(help="the URL of an OpenAI-compatible endpoint, with /v1")],
    key: Annotated[
        str, typer.Option(help="an API key; better in AZEOTROPE_KEY", envvar="AZEOTROPE_KEY")
    ] = "",
    model: Annotated[
        str | None, typer.Option(help="default: the first that the endpoint lists")
    ] = None,
) -> None:
    """Send every known leaking request to an endpoint and report what leaks."""
    from workflows.audit import main as run

    raise typer.Exit(run(url, key, model))


@app.command()
@app.command("trace", hidden=True)
def attribute(
    file: Annotated[
        Path, typer.Argument(help="lines of text, or JSON lines (.jsonl) with a field `text`")
    ],
    source: Annotated[str, typer.Argument(help="what was served: a run or a checkpoint's folder")],
    defense: Annotated[
        str | None, typer.Option(help="which point, where a run has several")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="checkpoint or folder (default: the source's)")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="share of green tokens (default: the source's)")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="tokens that decide a list (default: the source's)")
    ] = None,
    alarm_rate: Annotated[
        float, typer.Option(help="probability that unmarked text is attributed to any key")
    ] = 1e-4,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """Identify the API key whose watermark texts carry, by looking for every key's mark."""
    from workflows.attribute import main as run

    run(
        file,
        source,
        defense=defense,
        tokenizer=tokenizer,
        share=share,
        context=context,
        alarm_rate=alarm_rate,
        stores=store_location(store, redis),
    )


@app.command()
def doctor() -> None:
    """Say what is wrong with this machine, and how to mend it."""
    from workflows.doctor import main as run

    raise typer.Exit(run())


def main() -> None:
    """Run the command line; an expected error is one line and exit code 2."""
    try:
        app()
    except Exception as error:
        if not _is_expected(error):
            raise
        # Some messages quote a library that writes several lines.
        print("error:", *str(error).split(), file=sys.stderr)
        raise SystemExit(2) from None


def _is_expected(error: Exception) -> bool:
    """Errors whose message is written for the user; anything else is a bug and shows its trace."""
    from azeotrope.config import ConfigError

    names = {"RayStartError", "TrainingError", "WorkerError", "ExportError"}
    return isinstance(error, ConfigError | OSError) or type(error).__name__ in names
