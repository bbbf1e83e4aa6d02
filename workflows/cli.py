"""The console script `azeotrope`: one command a workflow; heavy imports happen inside them."""

import sys
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model's outputs useful to read and poor to distil, and prove it.",
)
ConfigName = Annotated[str, typer.Argument(help="a shipped configuration or a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")]


@app.command()
def pipeline(config: ConfigName, overrides: Overrides = None) -> None:
    """Defend a teacher, rob it, and report what the defense was worth."""
    from workflows.pipeline import main as run

    run(config, overrides or [])


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
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_expected(error: Exception) -> bool:
    """Errors whose message is written for the user; anything else is a bug and shows its trace."""
    from azeotrope.config import ConfigError

    names = {"RayStartError", "TrainingError", "ExportError"}
    return isinstance(error, ConfigError | FileNotFoundError) or type(error).__name__ in names


if __name__ == "__main__":
    main()
