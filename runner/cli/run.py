"""Commands that run stages: run, ingest, plan, params, sweep, repeat, predict, eda."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hm_reco.lake.published import read_vouched
from hm_reco.lake.storage import Lake, open_lake
from runner.cli.options import (
    DataOption,
    FileOption,
    ForceOption,
    JobsOption,
    JsonOption,
    LakeOption,
    ParameterOption,
    StagesArgument,
    VerboseOption,
    WaitOption,
    console,
    library_hooks,
    show,
    told,
)
from runner.cli.results import show_alerts, show_results

app = typer.Typer()


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
        local = "://" not in data
        given["data"] = str(Path(data).expanduser().resolve()) if local else data
    from_file = read_file(file) if file else {}
    resolved = resolve(chosen, (str(file), from_file), ("-p", given))
    return [Job(stage, resolved[stage.name], run) for stage in chosen]


def _run(lake: Lake, jobs: Sequence[Any], board: Any, limit: int, force: bool, wait: float | None):
    """Run jobs under the leases of their stages."""
    from hm_reco.lake.lease import leases
    from runner.execute import run_jobs

    def lost() -> None:
        board.say("the lease was taken away by another run: ending this one", "red")
        os.kill(os.getpid(), signal.SIGTERM)

    with leases(lake, [job.stage.name for job in jobs], wait, board.say, lost):
        return run_jobs(lake, jobs, board, library_hooks(), limit, force)


@app.command()
def run(
    stages: StagesArgument = None,
    data: DataOption = None,
    lake: LakeOption = None,
    parameter: ParameterOption = None,
    params: FileOption = None,
    force: ForceOption = False,
    jobs: JobsOption = 2,
    upstream: Annotated[bool, typer.Option("--upstream", help="And all stages before.")] = False,
    run_id: Annotated[
        str, typer.Option("--run-id", help="Name of the run; one that exists goes on.")
    ] = "",
    on: Annotated[
        str, typer.Option("--on", help="ray: each stage as a job of the cluster HM_CLUSTER.")
    ] = "",
    wait: WaitOption = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the stages' notebooks into a lake; what has not changed is not run again."""
    from hm_reco.compute.cluster import ClusterError
    from hm_reco.lake.runs import named_run, new_run_id
    from runner.backends.ray_jobs import BackendError
    from runner.board import Board
    from runner.execute import StageError
    from runner.graph import choose, load_pipeline
    from runner.graph import upstream as before

    with told(StageError, ClusterError, BackendError):
        if on not in ("", "ray"):
            raise ValueError(f"--on {on}: expected ray")
        run_id, target = named_run(run_id) if run_id else new_run_id(), open_lake(lake)
        if upstream and stages:
            chosen = [stage.name for stage in choose(load_pipeline(), stages)]
            stages = before(load_pipeline(), chosen)
        todo = _jobs(stages or [], data, parameter or [], params, run_id)
        board = Board(console, verbose, as_json)
        if on:
            from runner.backends.ray import run_on_ray

            entries = run_on_ray(target, todo, board, library_hooks(), jobs, force)
        else:
            entries = _run(target, todo, board, jobs, force, wait)
    if as_json:
        return print(json.dumps([vars(entry) for entry in entries], default=str, indent=2))
    if all(entry.state == "reused" for entry in entries):
        console.print("nothing to do: no stage's code, parameters or data changed (--force)")
    console.print()
    target = open_lake(lake)
    show_results(target, {entry.stage: entry.metrics for entry in entries})
    suffix = f" --lake {lake}" if lake else ""
    index = target.path("reports", "index.html")
    console.print(f"reports  {index}, or: hm report{suffix}", soft_wrap=True, highlight=False)
    serve = f"hm serve{suffix}" if lake else "make serve"
    console.print(f"serve    {serve}", soft_wrap=True, highlight=False)
    return None


@app.command()
def ingest(
    due: Annotated[
        bool, typer.Option("--due", help="Only sources whose schedule has struck; never wait.")
    ] = False,
    lake: LakeOption = None,
    parameter: ParameterOption = None,
    params: FileOption = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read the declared sources; with --due as often as you like, every minute say."""
    from hm_reco.data.ingest_log import last_read, read_loads
    from hm_reco.data.sources import declare, due_sources
    from hm_reco.lake.lease import LeaseError
    from hm_reco.lake.runs import new_run_id
    from runner.board import Board
    from runner.execute import StageError

    given, run_id, entries = list(parameter or []), new_run_id(), []
    with told(StageError):
        target, [job] = open_lake(lake), _jobs(["ingestion"], None, given, params, run_id)
        sources = declare(job.parameters.values["sources"])
        names = due_sources(sources, last_read(read_loads(target))) if due else []
        if names or not due:
            todo = _jobs(["ingestion"], None, [*given, f"only={json.dumps(names)}"], params, run_id)
            board = Board(console, verbose, as_json)
            try:
                entries = _run(target, todo, board, 1, force=due, wait=0 if due else None)
            except LeaseError as err:
                if not due:
                    raise
                board.say(f"{err}; what is due will be read the next time")
    if as_json:
        print(json.dumps([vars(entry) for entry in entries], default=str, indent=2))
    elif not names and due:
        console.print(f"nothing is due of {len(sources)} sources")


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
    from hm_reco.lake.runs import read_ledger
    from runner.cache import decide

    with told():
        target, rows, runs = open_lake(lake), [], set[str]()
        entries, vouched = read_ledger(target), read_vouched(target)
        for job in _jobs(stages or [], data, parameter or [], params, "plan"):
            decision = decide(
                vouched, job.stage, job.parameters.values, entries, library_hooks().fingerprint
            )
            before = [name for name in job.stage.after if name in runs]
            why = f"after {', '.join(before)}" if before and decision.reuse else decision.reason
            if before or not decision.reuse:
                runs.add(job.stage.name)
            if decision.reuse and not before:
                why = f"unchanged since run {decision.reuse.run_id}"
            does = "run" if job.stage.name in runs else "reuse"
            rows.append({"stage": job.stage.name, "would": does, "why": why})
        show("Plan", rows, as_json)


@app.command()
def params(stage: str, as_json: JsonOption = False) -> None:
    """List a stage's parameters: type, default, value in a whole run, meaning."""
    from runner.graph import choose, load_pipeline
    from runner.parameters import read_parameters, resolve, type_name

    with told():
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
        show(f"Parameters of {stage}", rows, as_json)


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
    from hm_reco.lake.runs import new_run_id
    from reports.pages import headline
    from runner.again import trials
    from runner.board import Board
    from runner.execute import StageError
    from runner.graph import choose, load_pipeline
    from runner.parameters import parse_assignments, read_file
    from runner.render import render_sweep
    from runner.stage import Job

    with told(StageError):
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
        show(f"Sweep {sweep_id}", rows, as_json)
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
    from runner.execute import StageError

    with told(StageError):
        rows = run_again(
            open_lake(lake), run_id, into, Board(console, verbose, as_json), library_hooks()
        )
        show(f"Repetition of run {run_id}", rows, as_json)
    if not all(row["agree"] for row in rows):
        raise typer.Exit(1)


@app.command()
def predict(
    everybody: Annotated[bool, typer.Option("--all", help="Required: for all customers.")],
    lake: LakeOption = None,
    shards: Annotated[int, typer.Option(min=1, help="Buckets of customers, each kept.")] = 8,
) -> None:
    """Everybody's list into predictions/, by the stage inference; interrupted, it goes on."""
    run(["inference"], lake=lake, parameter=[f"shards={shards}"])


@app.command()
def eda(
    compare: Annotated[str, typer.Option(help="A version of processed/purchases, or a run.")] = "",
    fail_on: Annotated[str, typer.Option(help="Exit code 1 at a notice or an alarm.")] = "",
    lake: LakeOption = None,
) -> None:
    """Describe the data in a report; hold them against an earlier version, or against alerts."""
    with told():
        if fail_on not in ("", "notice", "alarm"):
            raise ValueError(f"--fail-on {fail_on}: expected notice or alarm")
        run(["eda"], lake=lake, parameter=[f"compare={compare}"] if compare else [])
        show_alerts(open_lake(lake), fail_on)
