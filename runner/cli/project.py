"""Commands on the project itself: settings, synthetic data, new stages, manifests."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from runner.cli.options import JsonOption, WriteOption, console, show, told

app = typer.Typer()


@app.command()
def check() -> None:
    """Was a module of the library edited by hand? If so, how to bring that into its notebook."""
    from hm_reco.lake.fingerprint import PACKAGE, edited_by_hand

    with told():
        found = edited_by_hand(PACKAGE.parent)
        for module, notebook in found.items():
            text = f"{module} was edited, {notebook} was not; the next export overwrites it."
            console.print(text, highlight=False)
            console.print(f"  nbdev-update --fname {module}   brings the change into the notebook")
            console.print("  nbdev-export   drops it", highlight=False)
        if found:
            raise typer.Exit(1)


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder for the three files.")],
    customers: Annotated[int, typer.Option(help="Number of customers.", min=1)] = 20_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same world.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Invent a fashion shop: articles, customers and two years of purchases, as CSV files."""
    from hm_reco.data.synthetic import write_sample

    with told(), console.status(f"inventing {customers:,} customers"):
        rows = write_sample(out, customers, seed)
    show(str(out), [{"table": name, "rows": count} for name, count in rows.items()], as_json)


@app.command()
def config(
    write: Annotated[
        bool, typer.Option("--write", help="Bring the files made from the settings up to date.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show each setting, its value and where that comes from; secrets are masked."""
    from hm_reco.lake.settings import (
        aws_schema,
        explain_settings,
        find_settings_file,
        settings_page,
    )

    with told():
        if not write:
            rows = list(explain_settings())
            short = [{name: row[name] for name in ("setting", "value", "from")} for row in rows]
            return show("Settings", rows if as_json else short, as_json)
        home = find_settings_file()
        if not home:
            raise LookupError("no settings.ini here or above: the files belong beside it")
        folder = home.parent / "config"
        folder.mkdir(exist_ok=True)
        for name, content in (("aws.schema.json", aws_schema()), ("README.md", settings_page())):
            (folder / name).write_text(content, encoding="utf-8")
        return console.print(f"written: {folder}/aws.schema.json, README.md", soft_wrap=True)


@app.command("new-stage")
def new_stage(
    name: Annotated[str, typer.Argument(help="Such as price_watch.")],
    after: Annotated[str, typer.Option(help="The stage that it comes after.")] = "processing",
) -> None:
    """Begin a stage of your own: a notebook that runs, its place in the graph, its test."""
    from runner.scaffold import new_stage as begin

    with told():
        console.print("running the notebook once, on a small shop ...")
        for path in begin(name, after):
            console.print(f"written  {path}", soft_wrap=True, highlight=False)
    console.print(f"next     open it (make lab), hm run {name}, make test", highlight=False)


deploy_app = typer.Typer(help="Write what a cluster needs to run the pipeline.")


app.add_typer(deploy_app, name="deploy")


@deploy_app.callback()
def deploy() -> None:
    """Write what a cluster needs to run the pipeline."""


def _deliver(name: str, render: Callable[[list[Any]], str], write: bool) -> None:
    from runner.deployment import steps_of, write_manifest
    from runner.graph import load_pipeline

    with told():
        text = render(steps_of(load_pipeline()))
        if write:
            console.print(f"written: {write_manifest(name, text)}", soft_wrap=True)
        else:
            print(text, end="")


@deploy_app.command()
def argo(
    schedule: Annotated[str, typer.Option(help="When, as cron says it, in UTC.")] = "0 3 * * *",
    write: WriteOption = False,
) -> None:
    """The graph of stages as a WorkflowTemplate and a CronWorkflow of Argo."""
    from runner.backends.argo import workflows

    _deliver("argo", lambda steps: workflows(steps, schedule), write)


@deploy_app.command()
def ray(
    workers: Annotated[int, typer.Option(min=1, help="Machines beside the head.")] = 2,
    write: WriteOption = False,
) -> None:
    """The graph of stages as a RayJob of KubeRay, with a cluster of its own."""
    from runner.backends.kuberay import ray_job

    _deliver("ray", lambda steps: ray_job(steps, workers), write)
