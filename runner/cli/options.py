"""Common options of the commands, and functions to print rows and report errors."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hm_reco.lake.lease import LeaseError
from runner.hooks import Hooks

console, errors = Console(), Console(stderr=True, force_jupyter=False)


LakeOption = Annotated[
    str | None, typer.Option(help="A folder or s3://bucket/prefix; default: the setting `lake`.")
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


WaitOption = Annotated[
    float | None, typer.Option(help="Seconds to wait for another run; default: until it ends.")
]


StagesArgument = Annotated[list[str] | None, typer.Argument(help="Stages; default: all.")]


DataOption = Annotated[
    str | None,
    typer.Option(
        help="Folder, file, zip, s3://, https:// or database; default: a synthetic data set."
    ),
]


ParameterOption = Annotated[
    list[str] | None,
    typer.Option("-p", metavar="NAME=VALUE", help="A parameter; STAGE.NAME=VALUE for one stage."),
]


FileOption = Annotated[
    Path | None, typer.Option("--params", metavar="FILE", help="Parameters as YAML or JSON.")
]


ForceOption = Annotated[bool, typer.Option("--force", help="Also run unchanged stages.")]


JobsOption = Annotated[int, typer.Option("--jobs", help="Stages that run in parallel.", min=1)]


VerboseOption = Annotated[bool, typer.Option("-v", help="Show the output of the notebooks.")]


WriteOption = Annotated[
    bool, typer.Option("--write", help="Write to deploy/ in the checkout instead of printing.")
]


def get_library_hooks() -> Hooks:
    """Return the library functions that the runner calls."""
    from hm_reco.data.sources import fingerprint
    from hm_reco.registry.registry import build_model_rows

    return Hooks(fingerprint, build_model_rows)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool = False) -> None:
    """Print rows with the same columns as a table without empty columns, or as JSON."""
    if as_json:
        return print(json.dumps(rows, default=str, indent=2))
    empty = {name for name in rows[0] if all(row[name] == "" for row in rows)} if rows else set()
    rows = [{n: value for n, value in row.items() if n not in empty} for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in rows[0] if rows else ():
        is_number = isinstance(rows[0][name], int | float)
        is_last = name == list(rows[0])[-1]
        table.add_column(name, justify="right" if is_number else "left", no_wrap=not is_last)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    console.print(table if rows else title)
    return console.print()


@contextmanager
def user_errors(*extra: type[Exception]) -> Iterator[None]:
    """End the command with a message instead of a traceback, for user errors and `extra`."""
    s3 = (BotoCoreError, ClientError)
    handled: tuple[type[Exception], ...] = (
        ValueError,
        LookupError,
        OSError,
        LeaseError,
        *s3,
        *extra,
    )
    try:
        yield
    except handled as err:
        text = str(err.args[0] if isinstance(err, KeyError) else err)
        if isinstance(err, s3):
            text = f"S3: {text.rstrip('.')}; expected an existing bucket with access"
        errors.print(Text("error ", "bold red") + Text(text, "default"), soft_wrap=True)
        raise typer.Exit(getattr(err, "exit_code", 1)) from err
