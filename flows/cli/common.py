"""What the commands share: the app, the options, and how errors, notes and tables are printed."""

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.cli.options import defaults_of, flag, overrides_of
from tasks.logs import is_json
from tasks.options import PresetName
from tasks.progress import visible

__all__ = ["overrides_of"]

console = Console()
"""What was asked for: tables, answers."""
errors = Console(stderr=True)
notes = Console(stderr=True)
"""Progress and remarks, which --quiet leaves out."""

ModelOption = Annotated[str, flag("model")]
PresetOption = Annotated[PresetName | None, flag("preset")]
SetOption = Annotated[list[str] | None, flag("overrides")]
SeedOption = Annotated[int, flag("seed")]
DeviceOption = Annotated[
    str, typer.Option(help="Where to compute: `auto` (a GPU if there is one), `cpu`, `cuda`, or one GPU: `cuda:1`.")
]
DtypeOption = Annotated[Literal["auto", "float32", "bfloat16"], flag("dtype")]
OutputArgument = Annotated[str, typer.Argument(help="The folder or URL that `diffcolor run` wrote to.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results and errors only: no progress, no remarks.")
]
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Log what is done; -vv logs more.", show_default=False)
]


class App(typer.Typer):
    """Typer with -q and -v for every command."""

    def command(  # type: ignore[override]
        self, *arguments: Any, **options: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """As Typer's."""
        register = super().command(*arguments, **options)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_verbosity(function))
            return function

        return decorate


def _with_verbosity(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("quiet", kind, annotation=QuietOption, default=False),
        inspect.Parameter("verbose", kind, annotation=VerboseOption, default=0),
    ]

    @wraps(function)
    def command(*arguments: Any, quiet: bool, verbose: int, **given: Any) -> Any:
        notes.quiet = quiet
        verbose += given.get("log_format") == "json"  # such logs are kept, not read as they come
        level = "ERROR" if quiet else ("WARNING", "INFO", "DEBUG")[min(verbose, 2)]
        if quiet or verbose:
            os.environ["PREFECT_LOGGING_LEVEL"] = level
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", level)
        os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        return function(*arguments, **given)

    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return command


app = App(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from diffcolor_core._version import __version__

        typer.echo(f"diffcolor {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Colorize black-and-white photographs by text (DiffColor, arXiv 2308.01655).

    `colorize` does one picture, `run` a whole archive; `status` and `query` read what a run has written.

    Options of `run` can also be given in a file `diffcolor.toml` in the working folder and as DIFFCOLOR_* variables.

    Exit codes: **0** all done; **1** failed; **2** wrong usage; **3** a run finished, but some of its images were
    quarantined or failed: `diffcolor query OUTPUT "select image_key, error_message from results where status <> 'ok'"`
    names them; **130** stopped by Ctrl-C; **143** stopped by SIGTERM or `--max-hours`.
    """
    command = context.invoked_subcommand
    if command in ("run", "recolor", "colorize", "study"):
        parameters = [p.name for p in context.command.commands[command].params]  # type: ignore[attr-defined]
        try:
            context.default_map = {command: defaults_of(command, parameters)}
        except ValueError as error:
            raise fail(error, 2) from error


def device_of(text: str) -> str:
    """`--device` as torch takes it: "auto" is the first GPU if there is one. Raises ValueError for one not there."""
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {text}: give `auto`, `cpu`, `cuda` or `cuda:1`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {text}: torch sees {torch.cuda.device_count()} GPUs here; give `auto` or `cpu`")
    return text


def fail(error: Exception | str, code: int) -> typer.Exit:
    """Print the error, with control characters written out; return the exit to raise from it."""
    lines = "\n".join(map(visible, str(error).splitlines()))
    if is_json():
        logging.getLogger("diffcolor").error("%s", lines)
        return typer.Exit(code)
    errors.print(f"diffcolor: {lines}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(code)


@contextmanager
def errors_told() -> Iterator[None]:
    """Turn an error into one line and an exit code: 2 for what was asked wrongly, 1 for the rest."""
    from tasks.errors import OutputBusyError

    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except (ValueError, OutputBusyError) as error:
        raise fail(error, 2) from error
    except Exception as error:
        raise fail(f"{type(error).__name__}: {error}", 1) from error


def print_table(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print rows under their column names. Markup and control characters in them are shown, not obeyed."""
    rows = list(rows)
    table = Table()
    for name, *values in zip(names, *rows, strict=True):
        widest = max((len(shown(value)) for value in values if isinstance(value, datetime)), default=None)
        table.add_column(shown(name), overflow="fold", min_width=widest)  # times stay whole, the rest is folded
    for row in rows:
        table.add_row(*map(shown, row))
    console.print(table)


def shown(value: Any) -> str:
    """A value as a cell of a table."""
    if value is None:
        return ""
    return escape(f"{value:.4g}" if isinstance(value, float) else visible(str(value)))
