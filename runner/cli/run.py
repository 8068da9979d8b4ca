"""Commands that run stages: run, ingest, plan, params, sweep, reproduce, predict, eda."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hm_reco.lake.published import read_published
from hm_reco.lake.storage import open_lake
from runner.backends import RunOptions, get_run_backend, run_locally
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
    get_library_hooks,
    print_rows,
    user_errors,
)
from runner.cli.results import show_alerts, show_results

app = typer.Typer()


def _build_jobs(
    stages: Sequence[str],
    data: str | None,
    parameters: Sequence[str],
    parameter_file: Path | None,
    run_id: str,
) -> list[Any]:
    """Build the jobs of the stages; an error reports all invalid parameters."""
    from runner.graph import load_pipeline, select_stages
    from runner.parameters import parse_assignments, read_parameter_file, resolve
    from runner.stage import Job

    selected = select_stages(load_pipeline(), stages)
    assignments = parse_assignments(parameters)
    if data is not None:
        is_local = "://" not in data
        assignments["data"] = str(Path(data).expanduser().resolve()) if is_local else data
    from_file = read_parameter_file(parameter_file) if parameter_file else {}
    resolved = resolve(selected, (str(parameter_file), from_file), ("-p", assignments))
    return [Job(stage, resolved[stage.name], run_id) for stage in selected]


@app.command()
def run(
    stages: StagesArgument = None,
    data: DataOption = None,
    lake: LakeOption = None,
    parameter: ParameterOption = None,
    params: FileOption = None,
    force: ForceOption = False,
    jobs: JobsOption = 2,
    upstream: Annotated[
        bool, typer.Option("--upstream", help="Also run all upstream stages.")
    ] = False,
    run_id: Annotated[
        str, typer.Option("--run-id", help="Id of the run; continues an existing run.")
    ] = "",
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="local: this machine. ray: each stage as a job of the cluster HM_RAY_ADDRESS.",
        ),
    ] = "local",
    wait: WaitOption = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the stages' notebooks into a lake; unchanged stages are cached."""
    from hm_reco.compute.cluster import ClusterError
    from hm_reco.lake.runs import generate_run_id, validate_run_id
    from runner.backends.ray_jobs import BackendError
    from runner.display import RunDisplay
    from runner.graph import list_upstream, load_pipeline, select_stages
    from runner.scheduler import StageError

    with user_errors(StageError, ClusterError, BackendError):
        run_stages = get_run_backend(backend)
        run_id, target = validate_run_id(run_id) if run_id else generate_run_id(), open_lake(lake)
        if upstream and stages:
            selected = [stage.name for stage in select_stages(load_pipeline(), stages)]
            stages = list_upstream(load_pipeline(), selected)
        stage_jobs = _build_jobs(stages or [], data, parameter or [], params, run_id)
        display = RunDisplay(console, verbose, as_json)
        options = RunOptions(jobs, force, wait)
        stage_runs = run_stages(target, stage_jobs, display, get_library_hooks(), options)
    if as_json:
        return print(
            json.dumps([vars(stage_run) for stage_run in stage_runs], default=str, indent=2)
        )
    if all(stage_run.state == "cached" for stage_run in stage_runs):
        console.print("nothing to do: no stage's code, parameters or data changed (--force)")
    console.print()
    target = open_lake(lake)
    show_results(target, {stage_run.stage: stage_run.metrics for stage_run in stage_runs})
    suffix = f" --lake {lake}" if lake else ""
    index = target.path("reports", "index.html")
    console.print(f"reports  {index}, or: hm report{suffix}", soft_wrap=True, highlight=False)
    serve_command = f"hm serve{suffix}" if lake else "make serve"
    console.print(f"serve    {serve_command}", soft_wrap=True, highlight=False)
    return None


@app.command()
def ingest(
    due: Annotated[
        bool, typer.Option("--due", help="Only sources that are due; never wait.")
    ] = False,
    lake: LakeOption = None,
    parameter: ParameterOption = None,
    params: FileOption = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read the declared sources; with --due, run it at any interval, such as every minute."""
    from hm_reco.data.ingest_log import get_last_loaded_at, read_loads
    from hm_reco.data.sources import parse_sources, select_due_sources
    from hm_reco.lake.lease import LeaseError
    from hm_reco.lake.runs import generate_run_id
    from runner.display import RunDisplay
    from runner.scheduler import StageError

    assignments, run_id, stage_runs = list(parameter or []), generate_run_id(), []
    with user_errors(StageError):
        target, [job] = (
            open_lake(lake),
            _build_jobs(["ingestion"], None, assignments, params, run_id),
        )
        sources = parse_sources(job.parameters.values["sources"])
        names = select_due_sources(sources, get_last_loaded_at(read_loads(target))) if due else []
        if names or not due:
            due_sources = [f"only_sources={json.dumps(names)}"] if due else []
            stage_jobs = _build_jobs(
                ["ingestion"], None, [*assignments, *due_sources], params, run_id
            )
            display = RunDisplay(console, verbose, as_json)
            try:
                options = RunOptions(1, force=due, wait=0 if due else None)
                stage_runs = run_locally(target, stage_jobs, display, get_library_hooks(), options)
            except LeaseError as err:
                if not due:
                    raise
                display.log(f"{err}; the next call reads the due sources")
    if as_json:
        print(json.dumps([vars(stage_run) for stage_run in stage_runs], default=str, indent=2))
    elif not names and due:
        console.print(f"none of {len(sources)} sources is due")


@app.command()
def plan(
    stages: StagesArgument = None,
    data: DataOption = None,
    lake: LakeOption = None,
    parameter: ParameterOption = None,
    params: FileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which stages `hm run` would run, and why."""
    from hm_reco.lake.runs import read_runs
    from runner.cache import decide

    with user_errors():
        target, rows, to_run = open_lake(lake), [], set[str]()
        stage_runs, published = read_runs(target), read_published(target)
        for job in _build_jobs(stages or [], data, parameter or [], params, "plan"):
            decision = decide(
                published,
                job.stage,
                job.parameters.values,
                stage_runs,
                get_library_hooks().fingerprint,
            )
            waits_for = [name for name in job.stage.after if name in to_run]
            reason = (
                f"after {', '.join(waits_for)}"
                if waits_for and decision.cached_run
                else decision.reason
            )
            if waits_for or not decision.cached_run:
                to_run.add(job.stage.name)
            if decision.cached_run and not waits_for:
                reason = f"unchanged since run {decision.cached_run.run_id}"
            action = "run" if job.stage.name in to_run else "cached"
            rows.append({"stage": job.stage.name, "action": action, "reason": reason})
        print_rows("Plan", rows, as_json)


@app.command()
def params(stage: str, as_json: JsonOption = False) -> None:
    """List a stage's parameters: type, default, value in a whole run, meaning."""
    from runner.graph import load_pipeline, select_stages
    from runner.parameters import format_type, read_parameters, resolve

    with user_errors():
        [selected] = select_stages(load_pipeline(), [stage])
        values = resolve([selected])[stage].values
        rows = [
            {
                "parameter": p.name,
                "type": format_type(p.annotation),
                "default": "required" if p.default is ... else repr(p.default),
                "in a run": "" if values[p.name] == p.default else repr(values[p.name]),
                "meaning": p.help,
            }
            for p in read_parameters(selected.notebook)
        ]
        print_rows(f"Parameters of {stage}", rows, as_json)


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
    from hm_reco.lake.runs import generate_run_id
    from reports.pages import get_headline_figures
    from runner.display import RunDisplay
    from runner.graph import load_pipeline, select_stages
    from runner.parameters import parse_assignments, read_parameter_file
    from runner.render import render_sweep
    from runner.rerun import build_trials
    from runner.scheduler import StageError
    from runner.stage import Job

    with user_errors(StageError):
        target, sweep_id = open_lake(lake), generate_run_id()
        [selected] = select_stages(load_pipeline(), [stage])
        assignments = parse_assignments(parameter or [])
        trials = build_trials(
            selected, assignments, read_parameter_file(params) if params else {}, sweep_id
        )
        stage_jobs = [Job(selected, resolved, run_id) for run_id, (_, resolved) in trials.items()]
        display = RunDisplay(console, verbose, as_json)
        # trials run one by one unless the pipeline declares `sweep` parameters for them
        options = RunOptions(jobs if selected.sweep else 1, force, wait)
        failure: StageError | None = None
        try:
            stage_runs = run_locally(target, stage_jobs, display, get_library_hooks(), options)
        except StageError as err:
            stage_runs, failure = err.stage_runs, err
        varied = {run_id: values for run_id, (values, _) in trials.items()}
        stage_runs = sorted(stage_runs, key=lambda e: list(varied).index(e.run_id))
        render_sweep(target, sweep_id, varied, stage_runs)
        rows = [
            {"trial": e.run_id.rpartition("-")[2], **varied[e.run_id], "state": e.state}
            | get_headline_figures(e, {stage: selected})
            for e in stage_runs
        ]
        print_rows(f"Sweep {sweep_id}", rows, as_json)
        if not as_json:
            console.print(f"report  {target.path('reports', sweep_id, 'index.html')}")
        if failure:
            raise failure


@app.command()
def reproduce(
    run_id: str,
    lake: LakeOption = None,
    into: Annotated[
        str | None, typer.Option(help="Keep the reproduced run in this new lake.")
    ] = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reproduce a run with its code, parameters and table versions, and compare the metrics."""
    from runner.display import RunDisplay
    from runner.rerun import reproduce_run
    from runner.scheduler import StageError

    with user_errors(StageError):
        rows = reproduce_run(
            open_lake(lake),
            run_id,
            into,
            RunDisplay(console, verbose, as_json),
            get_library_hooks(),
        )
        print_rows(f"Reproduction of run {run_id}", rows, as_json)
    if not all(row["agree"] for row in rows):
        raise typer.Exit(1)


@app.command()
def predict(
    lake: LakeOption = None,
    shards: Annotated[int, typer.Option(min=1, help="Buckets of customers; saved one by one.")] = 8,
) -> None:
    """Write the lists of all customers to predictions/; continues after an interruption."""
    run(["inference"], lake=lake, parameter=[f"shards={shards}"])


@app.command()
def eda(
    compare: Annotated[str, typer.Option(help="A version of processed/purchases, or a run.")] = "",
    fail_on: Annotated[str, typer.Option(help="Exit code 1 at a warning or an error.")] = "",
    lake: LakeOption = None,
) -> None:
    """Report on the data, compare them with an earlier version, and check the alerts."""
    with user_errors():
        if fail_on not in ("", "warning", "error"):
            raise ValueError(f"--fail-on {fail_on}: expected warning or error")
        run(["eda"], lake=lake, parameter=[f"compare={compare}"] if compare else [])
        show_alerts(open_lake(lake), fail_on)
