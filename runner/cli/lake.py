"""Commands on the content of a lake: tables, runs, reports."""

import re
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from hm_reco.lake.lease import hold_leases
from hm_reco.lake.storage import TABLE_OWNERS, get_owner, open_lake
from hm_reco.lake.tables import list_table_names
from runner.cli.options import JsonOption, LakeOption, WaitOption, console, print_rows, user_errors

app = typer.Typer()


lake_app = typer.Typer(invoke_without_command=True, help="List a lake's tables, or clean it up.")


app.add_typer(lake_app, name="lake")


@lake_app.callback()
def list_tables(
    context: typer.Context, lake: LakeOption = None, as_json: JsonOption = False
) -> None:
    """List a lake's tables with versions, rows and sizes; `vacuum` cleans it up."""
    from hm_reco.lake.maintenance import describe_tables

    if context.invoked_subcommand is None:
        with user_errors():
            target = open_lake(lake)
            rows = describe_tables(target)
            print_rows(
                target.root if rows else f"No tables in {target.root}: hm run", rows, as_json
            )


@lake_app.command("vacuum")
def vacuum_tables(
    retention: Annotated[
        str, typer.Option(help="Keep versions that were visible within this time.")
    ] = "30d",
    lake: LakeOption = None,
    dry_run: Annotated[bool, typer.Option(help="Only count the files to remove.")] = False,
    wait: WaitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove files of old versions that no registered model or pinned run refers to."""
    from hm_reco.lake.maintenance import vacuum

    with user_errors():
        days = re.fullmatch(r"(\d+)d", retention)
        if not days:
            raise ValueError(f"--retention {retention}: expected a number of days, such as 30d")
        target = open_lake(lake)
        owners = {*TABLE_OWNERS.values(), *filter(None, map(get_owner, list_table_names(target)))}
        with hold_leases(target, sorted(owners), wait, console.print):
            file_counts = vacuum(target, int(days[1]), dry_run)
        rows = [{"table": name, "files": count} for name, count in file_counts.items()]
        print_rows("Would remove" if dry_run else "Removed", rows, as_json)


@app.command()
def runs(
    lake: LakeOption = None,
    pin: Annotated[str | None, typer.Option(help="Run whose versions are never removed.")] = None,
    last: Annotated[int, typer.Option(help="Stage runs to show; 0: all.", min=0)] = 40,
    as_json: JsonOption = False,
) -> None:
    """List the stage runs of a lake, the latest last: states, times, cost."""
    from hm_reco.lake.maintenance import pin_run
    from hm_reco.lake.runs import list_hosts, read_runs

    with user_errors():
        target = open_lake(lake)
        if pin is not None:
            pin_run(target, pin)
            return console.print(f"pinned: {pin}")
        stage_runs = read_runs(target)[-last:]
        if as_json:
            return print_rows("", [vars(stage_run) for stage_run in stage_runs], True)
        rows = [
            {
                "run": e.run_id,
                "stage": e.stage,
                "state": e.state,
                "host": host,
                "seconds": round(e.seconds, 1),
                "CPU s": round(e.cpu_seconds, 1),
                "peak MB": round(e.peak_memory_mb),
                "commit": e.git_commit[:8] + "+" * ("+" in e.git_commit),
                "cause": e.error.replace("\n", " ")[:60],
            }
            for e, host in zip(stage_runs, list_hosts(stage_runs), strict=True)
        ]
        return print_rows("Runs" if rows else "No runs yet: hm run", rows)


@app.command()
def report(
    run_id: Annotated[str, typer.Argument(help="Default: the index of all runs.")] = "",
    lake: LakeOption = None,
) -> None:
    """Open the reports in a browser, or print their location."""
    with user_errors():
        target = open_lake(lake)
        path = target.path("reports", *([run_id] if run_id else []), "index.html")
        if not path.exists():
            raise LookupError(f"no report at {path}; hm runs lists the runs")
        if not target.storage.is_local:
            text = f"{path}; to open it: hm serve, then http://127.0.0.1:8080/reports/"
            return console.print(text, soft_wrap=True)
        console.print(str(path), soft_wrap=True)
        webbrowser.open(Path(str(path)).as_uri())
        return None
