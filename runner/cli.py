"""The command `hm`: run the stages, serve the model, read what came out, keep the lake tidy."""

import json
import os
import re
import signal
import sys
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hm_reco.core.lake import Lake, open_lake, read_vouched
from hm_reco.core.settings import Settings

app = typer.Typer(
    help="Raw fashion purchases become served recommendations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
lake_app = typer.Typer(invoke_without_command=True, help="List a lake's tables, or clean it up.")
app.add_typer(lake_app, name="lake")
console, errors = Console(), Console(stderr=True)

LakeOption = Annotated[
    str | None, typer.Option(help="A folder or s3://bucket/prefix; default: the setting `lake`.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
StagesArgument = Annotated[list[str] | None, typer.Argument(help="Stages; default: all.")]
DataOption = Annotated[
    str | None, typer.Option(help="Folder, s3://bucket/prefix or zip; default: a sample world.")
]
ParameterOption = Annotated[
    list[str] | None,
    typer.Option("-p", metavar="NAME=VALUE", help="A parameter; STAGE.NAME=VALUE for one stage."),
]
FileOption = Annotated[
    Path | None, typer.Option("--params", metavar="FILE", help="Parameters as YAML or JSON.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Run also what has not changed.")]
JobsOption = Annotated[int, typer.Option("--jobs", help="Stages that run side by side.", min=1)]
WaitOption = Annotated[
    float | None, typer.Option(help="Seconds to wait for another run; default: till it ends.")
]
VerboseOption = Annotated[bool, typer.Option("-v", help="Show what the notebooks print.")]


@contextmanager
def _told() -> Iterator[None]:
    """What a user can mend ends the command with its message, not with a traceback."""
    from hm_reco.core.lease import LeaseError

    try:
        yield
    except (ValueError, LookupError, OSError, RuntimeError) as err:
        known = isinstance(err, ValueError | LookupError | OSError | LeaseError)
        if not known and type(err).__name__ != "StageError":
            raise
        text = str(err.args[0] if isinstance(err, KeyError) else err)
        errors.print(Text("error ", "bold red") + Text(text, "default"), soft_wrap=True)
        raise typer.Exit(128 + signal.SIGTERM if getattr(err, "stopped", False) else 1) from err


def _show(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool = False) -> None:
    if as_json:
        return print(json.dumps(rows, default=str, indent=2))
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in rows[0] if rows else ():
        number = isinstance(rows[0][name], int | float)
        last = name == list(rows[0])[-1]
        table.add_column(name, justify="right" if number else "left", no_wrap=not last)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    console.print(table if rows else title)
    return console.print()


def _jobs(
    stages: Sequence[str], data: str | None, parameters: Sequence[str], file: Path | None, run: str
) -> list[Any]:
    """The stages to be run with their parameters; all that is wrong with them is said at once."""
    from runner.graph import choose, load_pipeline
    from runner.parameters import parse_assignments, read_file, resolve
    from runner.stage import Job

    chosen = choose(load_pipeline(), stages)
    given = parse_assignments(parameters)
    if data is not None:
        local = not data.startswith("s3://")
        given["data"] = str(Path(data).expanduser().resolve()) if local else data
    from_file = read_file(file) if file else {}
    resolved = resolve(chosen, (str(file), from_file), ("-p", given))
    return [Job(stage, resolved[stage.name], run) for stage in chosen]


def _run(lake: Lake, jobs: Sequence[Any], board: Any, limit: int, force: bool, wait: float | None):
    """Run jobs under the leases of their stages."""
    from hm_reco.core.lease import leases
    from runner.execute import run_jobs

    def lost() -> None:
        board.say("the lease was taken away by another run: ending this one", "red")
        os.kill(os.getpid(), signal.SIGTERM)

    with leases(lake, [job.stage.name for job in jobs], wait, board.say, lost):
        return run_jobs(lake, jobs, board, limit, force)


@app.command()
def run(
    stages: StagesArgument = None,
    data: DataOption = None,
    lake: LakeOption = None,
    parameter: ParameterOption = None,
    params: FileOption = None,
    force: ForceOption = False,
    jobs: JobsOption = 2,
    wait: WaitOption = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the stages' notebooks into a lake; what has not changed is not run again."""
    from runner.board import Board
    from runner.ledger import new_run_id

    with _told():
        run_id, target = new_run_id(), open_lake(lake)
        todo = _jobs(stages or [], data, parameter or [], params, run_id)
        entries = _run(target, todo, Board(console, verbose, as_json), jobs, force, wait)
    if as_json:
        print(json.dumps([vars(entry) for entry in entries], default=str, indent=2))
    else:
        if all(entry.state == "reused" for entry in entries):
            console.print("nothing to do: no stage's code, parameters or data changed (--force)")
        _summary(open_lake(lake), {entry.stage: entry.metrics for entry in entries}, lake)


def _summary(lake: Lake, metrics: dict[str, Any], option: str | None) -> None:
    """What a person wants to see at the end of a run."""
    from hm_reco.core.predictions import recommended

    console.print()
    if "training" in metrics:
        _summarize_training(metrics["training"])
    if "inference" in metrics:
        for kind, customer_id in metrics["inference"]["examples"].items():
            rows, _ = recommended(lake, customer_id)
            _show(f"For a {kind} customer, {customer_id[:12]}…", rows[:4])
    suffix = f" --lake {option}" if option else ""
    reports = lake.path("reports", "index.html")
    console.print(f"reports  {reports}, or: hm report{suffix}", soft_wrap=True, highlight=False)
    serve = f"hm serve{suffix}" if option else "make serve"
    console.print(f"serve    {serve}", soft_wrap=True, highlight=False)


def _summarize_training(metrics: dict[str, Any]) -> None:
    rows = [
        {"method": name, "MAP@12": f"{mean:.4f}", "95 % interval": f"{low:.4f} .. {high:.4f}"}
        for name, (mean, low, high) in metrics["map12"].items()
    ]
    _show(f"Before {metrics['as_of']}, {metrics['customer_weeks']:,} customer-weeks", rows)
    mean, low, high = metrics["lead"]
    lead = f"{mean:.4f} ({low:.4f} .. {high:.4f})"
    over = f"lead of the ranker over {metrics['best_baseline']!r}"
    console.print(f"{over}: {lead}", soft_wrap=True, highlight=False)
    console.print(f"champion: {metrics['champion_method']!r}\n", highlight=False)


@app.command()
def plan(
    stages: StagesArgument = None,
    data: DataOption = None,
    lake: LakeOption = None,
    parameter: ParameterOption = None,
    params: FileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which stages `hm run` would run now, and why."""
    from runner.cache import decide
    from runner.ledger import read_ledger

    with _told():
        target, rows, runs = open_lake(lake), [], set[str]()
        entries, vouched = read_ledger(target), read_vouched(target)
        for job in _jobs(stages or [], data, parameter or [], params, "plan"):
            decision = decide(vouched, job.stage, job.parameters.values, entries)
            before = [name for name in job.stage.after if name in runs]
            why = f"after {', '.join(before)}" if before and decision.reuse else decision.reason
            if before or not decision.reuse:
                runs.add(job.stage.name)
            if decision.reuse and not before:
                why = f"unchanged since run {decision.reuse.run_id}"
            does = "run" if job.stage.name in runs else "reuse"
            rows.append({"stage": job.stage.name, "would": does, "why": why})
        _show("Plan", rows, as_json)


@app.command()
def params(stage: str, as_json: JsonOption = False) -> None:
    """List a stage's parameters: type, default, value in a whole run, meaning."""
    from runner.graph import choose, load_pipeline
    from runner.parameters import read_parameters, resolve, type_name

    with _told():
        [chosen] = choose(load_pipeline(), [stage])
        values = resolve([chosen])[stage].values
        rows = [
            {
                "parameter": p.name,
                "type": type_name(p.annotation),
                "default": "required" if p.default is ... else repr(p.default),
                "in a run": "" if values[p.name] == p.default else repr(values[p.name]),
                "meaning": p.help,
            }
            for p in read_parameters(chosen.notebook)
        ]
        _show(f"Parameters of {stage}", rows, as_json)


@app.command()
def sweep(
    stage: str,
    parameter: ParameterOption = None,
    params: FileOption = None,
    lake: LakeOption = None,
    force: ForceOption = False,
    jobs: JobsOption = 1,
    wait: WaitOption = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a stage once for each value of a list: -p learning_rate=[0.03,0.1]; lists make a grid."""
    from reports.pages import headline
    from runner.again import trials
    from runner.board import Board
    from runner.execute import StageError
    from runner.graph import choose, load_pipeline
    from runner.ledger import new_run_id
    from runner.parameters import parse_assignments, read_file
    from runner.render import render_sweep
    from runner.stage import Job

    with _told():
        target, sweep_id = open_lake(lake), new_run_id()
        [chosen] = choose(load_pipeline(), [stage])
        given = parse_assignments(parameter or [])
        found = trials(chosen, given, read_file(params) if params else {}, sweep_id)
        todo = [Job(chosen, resolved, run_id) for run_id, (_, resolved) in found.items()]
        board = Board(console, verbose, as_json)
        try:
            # trials that write the same tables take turns; which do not, the pipeline declares
            limit = jobs if chosen.sweep else 1
            entries, failure = _run(target, todo, board, limit, force, wait), None
        except StageError as err:
            entries, failure = err.ended, err
        varied = {run_id: values for run_id, (values, _) in found.items()}
        entries = sorted(entries, key=lambda e: list(varied).index(e.run_id))
        render_sweep(target, sweep_id, varied, entries)
        rows = [
            {"trial": e.run_id.rpartition("-")[2], **varied[e.run_id], "state": e.state}
            | headline(e, {stage: chosen})
            for e in entries
        ]
        _show(f"Sweep {sweep_id}", rows, as_json)
        if not as_json:
            console.print(f"report  {target.path('reports', sweep_id, 'index.html')}")
        if failure:
            raise failure


@app.command()
def repeat(
    run_id: str,
    lake: LakeOption = None,
    into: Annotated[str | None, typer.Option(help="Keep the repetition in this new lake.")] = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a run again, with its code, parameters and table versions: do the metrics agree?"""
    from runner.again import repeat as run_again
    from runner.board import Board

    with _told():
        rows = run_again(open_lake(lake), run_id, into, Board(console, verbose, as_json))
        _show(f"Repetition of run {run_id}", rows, as_json)
    if not all(row["agree"] for row in rows):
        raise typer.Exit(1)


@app.command()
def runs(
    lake: LakeOption = None,
    keep: Annotated[str | None, typer.Option(help="Never let go what this run refers to.")] = None,
    last: Annotated[int, typer.Option(help="Entries to show; 0: all.", min=0)] = 40,
    as_json: JsonOption = False,
) -> None:
    """List what ran in a lake, the newest last: stages, states, times, cost."""
    from hm_reco.core.upkeep import keep_run
    from runner.ledger import read_ledger

    with _told():
        target = open_lake(lake)
        if keep is not None:
            keep_run(target, keep)
            return console.print(f"kept: {keep}")
        entries = read_ledger(target)[-last:]
        if as_json:
            return _show("", [vars(entry) for entry in entries], True)
        rows = [
            {
                "run": e.run_id,
                "stage": e.stage,
                "state": e.state,
                "seconds": round(e.seconds, 1),
                "CPU s": round(e.cpu_seconds, 1),
                "peak MB": round(e.peak_memory_mb),
                "commit": e.git_commit[:8] + "+" * ("+" in e.git_commit),
                "cause": e.error.replace("\n", " ")[:60],
            }
            for e in entries
        ]
        return _show("Runs" if rows else "No runs yet: hm run", rows)


@app.command()
def report(
    run_id: Annotated[str, typer.Argument(help="Default: the index of all runs.")] = "",
    lake: LakeOption = None,
) -> None:
    """Open the reports in a browser, or say where they are."""
    with _told():
        target = open_lake(lake)
        path = target.path("reports", *([run_id] if run_id else []), "index.html")
        if not path.exists():
            raise LookupError(f"no report at {path}; hm runs lists what ran")
        if target.client:
            text = f"{path}; to read it here: hm serve, then http://127.0.0.1:8080/reports/"
            return console.print(text, soft_wrap=True)
        console.print(str(path), soft_wrap=True)
        webbrowser.open(Path(str(path)).as_uri())
        return None


@lake_app.callback()
def list_tables(
    context: typer.Context, lake: LakeOption = None, as_json: JsonOption = False
) -> None:
    """List a lake's tables with versions, rows and sizes; or clean it up by `vacuum`."""
    from hm_reco.core.upkeep import describe

    if context.invoked_subcommand is None:
        with _told():
            target = open_lake(lake)
            rows = describe(target)
            _show(target.root if rows else f"No tables in {target.root}: hm run", rows, as_json)


@lake_app.command("vacuum")
def vacuum_tables(
    keep: Annotated[str, typer.Option(help="Keep what was visible within this time.")] = "30d",
    lake: LakeOption = None,
    dry_run: Annotated[bool, typer.Option(help="Only count what would go.")] = False,
    wait: WaitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove old versions' files, but none that a registered model or a kept run refers to."""
    from hm_reco.core.lake import STAGE_OF
    from hm_reco.core.lease import leases
    from hm_reco.core.upkeep import vacuum

    with _told():
        days = re.fullmatch(r"(\d+)d", keep)
        if not days:
            raise ValueError(f"--keep {keep}: expected a number of days, such as 30d")
        target = open_lake(lake)
        with leases(target, [*STAGE_OF.values()], wait, console.print):
            removed = vacuum(target, int(days[1]), dry_run)
        rows = [{"table": name, "files": count} for name, count in removed.items()]
        _show("Would remove" if dry_run else "Removed", rows, as_json)


@app.command()
def recommend(customer_id: str, lake: LakeOption = None, as_json: JsonOption = False) -> None:
    """Show the articles that the last run recommends to a customer."""
    from hm_reco.core.predictions import recommended

    with _told():
        rows, known = recommended(open_lake(lake), customer_id)
        _show(
            f"For {customer_id[:12] + '…' if known else 'a customer nobody knows'}", rows, as_json
        )


@app.command()
def submission(
    out: Annotated[Path, typer.Option(help="The CSV file to write.")], lake: LakeOption = None
) -> None:
    """Write all customers' 12 articles in Kaggle's submission format."""
    from hm_reco.core.predictions import write_submission

    with _told():
        rows = write_submission(open_lake(lake), out)
        console.print(f"{out}: {rows:,} customers", highlight=False)


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
    """Serve the champion over REST, and the reports: /healthz, /predict, /reports/."""
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
    sys.exit(app())
