"""What the commands share: the app, the options, how errors and tables are printed."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.progress import visible

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Colorize black-and-white photographs by text (DiffColor, arXiv 2308.01655).

    `colorize` does one picture, `run` a whole archive, `query` and `status` read what a run has left.

    Exit codes: **0** all done; **1** failed; **2** wrong usage; **3** a run finished, but some of its
    images were quarantined or failed: `diffcolor query OUTPUT "select image_key, error_message from
    results where status <> 'ok'"` names them.""",
)
console = Console()
errors = Console(stderr=True)

ModelOption = Annotated[
    str, typer.Option(help="`demo`, a local diffusers folder, or a hub id at a commit: `owner/name@commit`.")
]
PresetOption = Annotated[
    str, typer.Option(help="`demo`: seconds on a CPU, for the demo model. `paper`: 1500/500/1000 steps, a GPU's work.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="A setting other than the preset's: `stage2.adapter_rank=4`. Repeat it."
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed of every random draw: same seed, same bytes on the same hardware.")]
NumActorsOption = Annotated[int, typer.Option(min=1, help="Ray actors: images worked on at a time.")]
GpusOption = Annotated[float, typer.Option(min=0, help="GPUs for each; 0 runs on the CPU.")]
RayOption = Annotated[str | None, typer.Option(help="An existing Ray cluster. Default: a local Ray for this run.")]
RunIdOption = Annotated[str | None, typer.Option(help="Name of the run in the manifest. Default: its start time.")]
OutputArgument = Annotated[str, typer.Argument(help="The folder (or fsspec URL) that `diffcolor run` wrote to.")]


def overrides_of(assignments: list[str] | None) -> dict[str, Any]:
    """`--set` as the core takes it; a value is JSON (4, 0.5, true, null, [1.0, 1.2]) or else a word.

    Raises ValueError for one without "=".
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments or ():
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r}: write it as PATH=VALUE, e.g. stage2.adapter_rank=4")
        try:
            overrides[path] = json.loads(text)
        except ValueError:
            overrides[path] = text
    return overrides


def fail(error: Exception | str, code: int) -> typer.Exit:
    """Print the error, a terminal's commands in it written out; the exit to raise from it."""
    lines = "\n".join(map(visible, str(error).splitlines()))
    errors.print(f"diffcolor: {lines}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(code)


@contextmanager
def errors_told() -> Iterator[None]:
    """Errors in a line: exit code 2 for what was asked wrongly (no manifest there, a query, a URL), 1 for the rest."""
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
    """Rows under their column names. What they hold is shown, never obeyed: no markup, no control characters."""
    rows = list(rows)
    table = Table()
    for name, *values in zip(names, *rows, strict=True):
        widest = max((len(shown(value)) for value in values if isinstance(value, datetime)), default=None)
        table.add_column(shown(name), overflow="fold", min_width=widest)  # times stay whole, the rest is folded
    for row in rows:
        table.add_row(*map(shown, row))
    console.print(table)


def shown(value: Any) -> str:
    """A value as a table's cell."""
    if value is None:
        return ""
    return escape(f"{value:.4g}" if isinstance(value, float) else visible(str(value)))
