"""The command `hm`: run the stages, serve the model, read what came out."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from rich.console import Console
from rich.table import Table

from hm_reco.core.lake import Lake, open_lake, scan
from hm_reco.core.settings import Settings

app = typer.Typer(
    help="Raw fashion purchases become served recommendations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)

LakeOption = Annotated[
    str | None, typer.Option(help="A folder or s3://bucket/prefix; default: the setting `lake`.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def _told() -> Iterator[None]:
    """What a user can mend ends the command with its message, not with a traceback."""
    from runner.execute import StageError

    try:
        yield
    except (ValueError, LookupError, FileNotFoundError, StageError) as err:
        errors.print(f"[bold red]error[/] {_plain(err)}", highlight=False)
        raise typer.Exit(1) from err


def _plain(err: Exception) -> str:
    return str(err.args[0] if isinstance(err, KeyError) else err).replace("[", r"\[")


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in rows[0] if rows else ():
        number = isinstance(rows[0][name], int | float)
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    console.print()


def _show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, default=str, indent=2))
    elif rows:
        _table(title, rows)
    else:
        console.print(title)


@app.command()
def run(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages; default: all.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder, s3://bucket/prefix or zip; default: a sample world.")
    ] = None,
    lake: LakeOption = None,
    parameter: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="A stage's parameter.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the stages' notebooks into a lake: ingestion, processing, eda, training, inference."""
    from runner.execute import run_pipeline, to_json
    from runner.graph import choose, load_pipeline
    from runner.ledger import new_run_id
    from runner.parameters import parse_assignments, resolve

    with _told():
        chosen = choose(load_pipeline(), stages or [])
        given = parse_assignments(parameter or [])
        if data is not None:
            local = not data.startswith("s3://")
            given["data"] = str(Path(data).expanduser().resolve()) if local else data
        parameters = resolve(chosen, given)
        target, run_id = open_lake(lake), new_run_id()
        tell = (lambda *_: None) if as_json else _tell
        progress = sys.stderr.isatty() and not as_json
        entries = run_pipeline(target, chosen, parameters, run_id, tell, progress)
    if as_json:
        print(to_json(entries))
    else:
        _summary(target, run_id, {entry.stage: entry.metrics for entry in entries}, lake)


def _tell(stage: str, entry: Any) -> None:
    if entry is None:
        console.print(f"{stage:<11} …", style="dim", end="\r" if console.is_terminal else "\n")
    else:
        cost = f"{entry.seconds:6.1f} s, peak {entry.peak_memory_mb:5.0f} MB"
        console.print(f"{stage:<11} [green]done[/] {cost}", highlight=False)


def _summary(lake: Lake, run_id: str, metrics: dict[str, Any], option: str | None) -> None:
    """What a person wants to see at the end of a run."""
    console.print()
    if "training" in metrics:
        _summarize_training(metrics["training"])
    if "inference" in metrics:
        for kind, customer_id in metrics["inference"]["examples"].items():
            rows = _recommended(lake, customer_id)[:4]
            _table(f"For a {kind} customer, {customer_id[:12]}…", rows)
    suffix = f" --lake {option}" if option else ""
    console.print(f"reports  {lake.path('reports', 'index.html')}", soft_wrap=True, highlight=False)
    serve = f"hm serve{suffix}" if option else "make serve"
    console.print(f"serve    {serve}", soft_wrap=True, highlight=False)


def _summarize_training(metrics: dict[str, Any]) -> None:
    rows = [
        {"method": name, "MAP@12": f"{mean:.4f}", "95 % interval": f"{low:.4f} .. {high:.4f}"}
        for name, (mean, low, high) in metrics["map12"].items()
    ]
    _table(f"Before {metrics['as_of']}, {metrics['customer_weeks']:,} customer-weeks", rows)
    mean, low, high = metrics["lead"]
    lead = f"{mean:.4f} ({low:.4f} .. {high:.4f})"
    over = f"lead of the ranker over {metrics['best_baseline']!r}"
    console.print(f"{over}: {lead}", soft_wrap=True, highlight=False)
    console.print(f"champion: {metrics['champion_method']!r}\n", highlight=False)


def _recommended(lake: Lake, customer_id: str) -> list[dict[str, Any]]:
    """A customer's stored list with names; a customer unknown to the lake gets the strangers'."""
    rows = scan(lake, "predictions/customers").filter(customer_id=customer_id).collect()
    if rows.is_empty():
        rows = scan(lake, "predictions/strangers").collect()
    names = scan(lake, "raw/articles").select("article_id", "prod_name", "colour_group_name")
    named = rows.sort("rank").lazy().join(names, on="article_id", maintain_order="left").collect()
    return named.select(
        "rank",
        "article_id",
        article="prod_name",
        colour="colour_group_name",
        score=pl.col("score").cast(pl.Float64).round(4),
        source="source",
    ).to_dicts()


@app.command()
def recommend(customer_id: str, lake: LakeOption = None, as_json: JsonOption = False) -> None:
    """Show the articles that the last run recommends to a customer."""
    with _told():
        target = open_lake(lake)
        known = scan(target, "processed/customers").filter(customer_id=customer_id)
        new = known.select("customer").collect().is_empty()
        who = "a customer nobody knows" if new else customer_id[:12] + "…"
        _show(f"For {who}", _recommended(target, customer_id), as_json)


@app.command()
def submission(
    out: Annotated[Path, typer.Option(help="The CSV file to write.")], lake: LakeOption = None
) -> None:
    """Write all customers' 12 articles in Kaggle's submission format."""
    with _told():
        lists = scan(open_lake(lake), "predictions/customers").sort("customer_id", "rank")
        joined = lists.group_by("customer_id", maintain_order=True).agg(
            prediction=pl.col("article_id").str.join(" ")
        )
        part = out.with_name(f".{out.name}.part")
        joined.sink_csv(part)
        part.replace(out)
        rows = pl.scan_csv(out).select(pl.len()).collect().item()
        console.print(f"{out}: {rows:,} customers", highlight=False)


@app.command()
def runs(lake: LakeOption = None, as_json: JsonOption = False) -> None:
    """List what ran in a lake: stages, states, times, peak memory."""
    from runner.ledger import read_ledger

    with _told():
        rows = read_ledger(open_lake(lake)).to_dicts()
        if as_json:
            return _show("", rows, True)
        short = [
            {
                "run": row["run_id"],
                "stage": row["stage"],
                "state": row["state"],
                "seconds": round(row["seconds"], 1),
                "peak MB": round(row["peak_memory_mb"]),
                "commit": row["git_commit"][:8],
                "error": row["error"][:60],
            }
            for row in rows
        ]
        return _show("Runs" if short else "No runs yet: hm run", short, False)


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder for the three files.")],
    customers: Annotated[int, typer.Option(help="Number of customers.", min=1)] = 20_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same world.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Invent a fashion shop: articles, customers and two years of purchases, as CSV files."""
    from hm_reco.core.sample import write_sample

    with _told(), console.status(f"inventing {customers:,} customers"):
        rows = write_sample(out, customers, seed)
    _show(str(out), [{"table": name, "rows": count} for name, count in rows.items()], as_json)


@app.command()
def serve(
    lake: LakeOption = None,
    host: Annotated[str | None, typer.Option(help="Default: the setting `host`.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: the setting `port`.")] = None,
) -> None:
    """Serve the champion over REST: GET /healthz, POST /predict."""
    import uvicorn

    if lake:
        os.environ["HM_LAKE"] = lake
    settings = Settings()
    uvicorn.run(
        "hm_reco.stages.inference:app",
        host=host or settings.host,
        port=port or settings.port,
        log_level=settings.log_level.lower(),
    )


if __name__ == "__main__":
    app()
