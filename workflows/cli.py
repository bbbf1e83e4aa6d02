"""The program `azeotrope`: one command per workflow. Commands import heavy modules late."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from azeotrope import __version__
from workflows.keys import RedisUrl, StorePath, store_location
from workflows.keys import app as keys

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model's outputs useful to read and poor to distil, and prove it.",
)
app.add_typer(keys, name="keys")
ConfigName = Annotated[
    str, typer.Argument(help="name of a shipped configuration, or path of a YAML file")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="changes to the configuration: key.sub=value ...")
]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def pipeline(config: ConfigName, overrides: Overrides = None) -> None:
    """Defend a teacher, attack it, and report what the defense was worth."""
    from workflows.pipeline import main as run

    run(config, overrides or [])


@app.command()
def validate(config: ConfigName, overrides: Overrides = None) -> None:
    """Check a configuration without a network, and list what a run would do."""
    from workflows.validate import main as run

    run(config, overrides or [])


@app.command()
def defend(config: ConfigName, overrides: Overrides = None) -> None:
    """Train and export defended teachers, without attacking them."""
    from workflows.defend import main as run

    run(config, overrides or [])


@app.command()
def generate(config: ConfigName, overrides: Overrides = None) -> None:
    """Let a teacher write traces to Parquet files."""
    from workflows.generate import main as run

    run(config, overrides or [])


@app.command()
def attack(
    config: ConfigName,
    traces: Annotated[str, typer.Argument(help="folder of trace files")],
    overrides: Overrides = None,
) -> None:
    """Train students on existing traces, and examine them."""
    from workflows.attack import main as run

    run(config, traces, overrides or [])


@app.command()
def ablate(
    config: ConfigName,
    setting: Annotated[
        str,
        typer.Argument(
            help="strength, rank, layer, kd_weight, temperature (or tau), or a path within the "
            "first defense"
        ),
    ],
    values: Annotated[str, typer.Argument(help="two or more values, separated by commas")],
    overrides: Overrides = None,
) -> None:
    """Vary one setting, and plot its effect on the teacher and on its students."""
    from workflows.ablate import main as run

    run(config, setting, values, overrides or [])


@app.command()
def evaluate(
    config: ConfigName,
    model: Annotated[str, typer.Argument(help="pocket/NAME, a checkpoint's folder or a hub name")],
    overrides: Overrides = None,
) -> None:
    """Examine any checkpoint on the test problems."""
    from workflows.evaluate import main as run

    run(config, model, overrides or [])


@app.command()
def usage(
    key: Annotated[
        str | None, typer.Option(metavar="ID", help="show only the key with this id")
    ] = None,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """Show the usage of each API key per day."""
    from workflows.usage import main as run

    run(key, store_location(store, redis))


@app.command()
def serve(
    source: Annotated[
        str, typer.Argument(help="folder of a run or of a checkpoint, or pocket/NAME")
    ],
    overrides: Overrides = None,
    policy: Annotated[str | None, typer.Option(help="YAML file of tiers and limits")] = None,
    write: Annotated[
        str | None, typer.Option(help="write a file for `serve deploy` instead of serving")
    ] = None,
    redis: RedisUrl = None,
) -> None:
    """Serve a defended teacher behind the gateway until interrupted."""
    from workflows.serve import main as run

    run(source, overrides or [], policy, write, redis)


@app.command()
def audit(
    url: Annotated[str, typer.Argument(help="address of an OpenAI-compatible endpoint, with /v1")],
    key: Annotated[
        str,
        typer.Option(
            help="API key; the environment variable hides it from other users of the machine",
            envvar="AZEOTROPE_KEY",
        ),
    ] = "",
    model: Annotated[
        str | None, typer.Option(help="name of the model (default: the endpoint's first)")
    ] = None,
) -> None:
    """Probe an endpoint for everything that is known to leak, and report what leaked."""
    from workflows.audit import main as run

    raise typer.Exit(run(url, key, model))


@app.command()
@app.command("trace", hidden=True)
def attribute(
    file: Annotated[
        Path, typer.Argument(help="texts, one per line, or JSON lines (.jsonl) with a field `text`")
    ],
    source: Annotated[
        str, typer.Argument(help="what was served: folder of a run or of a checkpoint")
    ],
    defense: Annotated[
        str | None, typer.Option(help="name of the defense, if the run has several")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="checkpoint or folder (default: the source's)")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="share of green tokens (default: the source's)")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="previous tokens that choose the green list (default: the source's)"),
    ] = None,
    alarm_rate: Annotated[
        float, typer.Option(help="rate at which text of other origin may be attributed to a key")
    ] = 1e-4,
    store: StorePath = None,
    redis: RedisUrl = None,
) -> None:
    """Find the API key whose watermark is in given texts."""
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
    """Check this machine, and say how to fix what is wrong."""
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
    """Whether the message is written for the user; any other error is a bug and shows its trace."""
    from azeotrope.config import ConfigError

    # Compared by name, because importing these classes loads Ray.
    names = {
        "RayStartError",
        "TrainingError",
        "WorkerError",
        "ExportError",
        "IncompleteStageError",
        "UnsharedFolderError",
    }
    return isinstance(error, ConfigError | OSError) or type(error).__name__ in names
