"""Commands on the project itself: settings, synthetic data, new stages, manifests."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from runner.backends.argo import NIGHTLY_SCHEDULE, build_workflows
from runner.cli.options import JsonOption, WriteOption, console, print_rows, user_errors

app = typer.Typer()


@app.command()
def check_export() -> None:
    """List modules that were edited without their notebooks, and the commands to sync them."""
    from hm_reco.lake.fingerprint import PACKAGE_ROOT, find_unsynced_modules

    with user_errors():
        unsynced = find_unsynced_modules(PACKAGE_ROOT.parent)
        for module, notebook in unsynced.items():
            text = f"{module} was edited, {notebook} was not; the next export overwrites it."
            console.print(text, highlight=False)
            console.print(f"  nbdev-update --fname {module}   copies the change to the notebook")
            console.print("  nbdev-export   discards the change", highlight=False)
        if unsynced:
            raise typer.Exit(1)


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="Folder for the three files.")],
    customers: Annotated[int, typer.Option(help="Number of customers.", min=1)] = 20_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same data.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Generate a synthetic data set: articles, customers and two years of purchases, as CSV."""
    from hm_reco.data.synthetic import write_synthetic

    with user_errors(), console.status(f"generating {customers:,} customers"):
        rows = write_synthetic(out, customers, seed)
    print_rows(str(out), [{"table": name, "rows": count} for name, count in rows.items()], as_json)


@app.command()
def config(
    write: Annotated[
        bool, typer.Option("--write", help="Update the files generated from the settings.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print each setting, its value and its source; secrets are masked."""
    from hm_reco.lake.settings import (
        build_aws_schema,
        explain_settings,
        find_settings_file,
        render_settings_page,
    )

    with user_errors():
        if not write:
            rows = list(explain_settings())
            columns = [{name: row[name] for name in ("setting", "value", "source")} for row in rows]
            return print_rows("Settings", rows if as_json else columns, as_json)
        settings_file = find_settings_file()
        if not settings_file:
            raise LookupError(
                "no settings.ini in this folder or above; the files belong next to it"
            )
        folder = settings_file.parent / "config"
        folder.mkdir(exist_ok=True)
        for name, content in (
            ("aws.schema.json", build_aws_schema()),
            ("README.md", render_settings_page()),
        ):
            (folder / name).write_text(content, encoding="utf-8")
        return console.print(f"written: {folder}/aws.schema.json, README.md", soft_wrap=True)


@app.command("new-stage")
def new_stage(
    name: Annotated[str, typer.Argument(help="Such as price_watch.")],
    after: Annotated[str, typer.Option(help="Its upstream stage.")] = "processing",
) -> None:
    """Create a stage: a working notebook, its graph entry and its test."""
    from runner.scaffold import new_stage as create_stage

    with user_errors():
        console.print("running the notebook once, on a small synthetic data set ...")
        for path in create_stage(name, after):
            console.print(f"written  {path}", soft_wrap=True, highlight=False)
    console.print(f"next     open it (make lab), hm run {name}, make test", highlight=False)


manifests_app = typer.Typer(help="Print or write the manifests that run the pipeline on a cluster.")


app.add_typer(manifests_app, name="manifests")


@manifests_app.callback()
def manifests() -> None:
    """Print or write the manifests that run the pipeline on a cluster."""


def _output_manifest(name: str, render: Callable[[list[Any]], str], write: bool) -> None:
    from runner.deployment import build_steps, write_manifest_file
    from runner.graph import load_pipeline

    with user_errors():
        text = render(build_steps(load_pipeline()))
        if write:
            console.print(f"written: {write_manifest_file(name, text)}", soft_wrap=True)
        else:
            print(text, end="")


@manifests_app.command()
def argo(
    schedule: Annotated[str, typer.Option(help="Cron expression in UTC.")] = NIGHTLY_SCHEDULE,
    write: WriteOption = False,
) -> None:
    """Output a WorkflowTemplate and a CronWorkflow of Argo for the graph of stages."""
    _output_manifest("argo", lambda steps: build_workflows(steps, schedule), write)


@manifests_app.command()
def ray(
    workers: Annotated[int, typer.Option(min=1, help="Machines in addition to the head.")] = 2,
    write: WriteOption = False,
) -> None:
    """Output a RayJob of KubeRay with its own cluster for the graph of stages."""
    from runner.backends.kuberay import build_ray_job

    _output_manifest("ray", lambda steps: build_ray_job(steps, workers), write)
