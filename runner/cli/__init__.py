"""The command `hm`: run the stages, list the runs, serve the model and the reports."""

import sys
from typing import Annotated

import typer

from hm_reco.lake.storage import Lake
from runner.cli import lake, models, project, run, serve
from runner.cli.options import console, get_library_hooks


def _refresh_index(result: object, **_: object) -> None:
    """Render the index of the reports after a command that returns its lake."""
    from runner.render import render_index

    if isinstance(result, Lake):
        render_index(result, get_library_hooks())


app = typer.Typer(
    result_callback=_refresh_index,
    invoke_without_command=True,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Version and commit.")] = False,
) -> None:
    """Turn raw fashion purchases into served recommendations."""
    if version:
        from hm_reco.lake.fingerprint import get_package_version
        from hm_reco.lake.runs import get_git_commit
        from runner.graph import find_project_root

        root = find_project_root()
        console.print(f"hm-reco {get_package_version(root)} ({get_git_commit(root)})")
        raise typer.Exit


for command_module in (run, lake, serve, models, project):
    app.add_typer(command_module.app)


def main() -> None:
    """Run the command `hm`."""
    try:
        app()
    except ModuleNotFoundError as err:
        if err.name is None or err.name.partition(".")[0] in ("hm_reco", "runner", "reports"):
            raise
        sys.exit(f"error {err.name} is not installed; stages need: pip install 'hm-reco[stages]'")
