"""The command `hm`: run the stages, see how runs went, serve the model and the reports."""

import sys
from typing import Annotated

import typer

from hm_reco.lake.storage import Lake
from runner.cli import lake, models, project, run, serve
from runner.cli.options import console, library_hooks


def _changed(result: object, **_: object) -> None:
    """A command that changes what the index of the reports tells returns its lake."""
    from runner.render import render_index

    if isinstance(result, Lake):
        render_index(result, library_hooks())


app = typer.Typer(
    result_callback=_changed,
    invoke_without_command=True,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Version and commit.")] = False,
) -> None:
    """Raw fashion purchases become served recommendations."""
    if version:
        from hm_reco.lake.fingerprint import release
        from hm_reco.lake.runs import git_commit
        from runner.graph import project_root

        console.print(f"hm-reco {release(project_root())} ({git_commit(project_root())})")
        raise typer.Exit


for part in (run, lake, serve, models, project):
    app.add_typer(part.app)


def main() -> None:
    """The command `hm`."""
    try:
        app()
    except ModuleNotFoundError as err:
        if err.name is None or err.name.partition(".")[0] in ("hm_reco", "runner", "reports"):
            raise
        sys.exit(f"error {err.name} is not installed; stages need: pip install 'hm-reco[stages]'")
