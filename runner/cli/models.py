"""Commands on models and recommendations."""

from pathlib import Path
from typing import Annotated

import typer

from hm_reco.lake.storage import Lake, open_lake
from runner.cli.options import JsonOption, LakeOption, console, show, told

app = typer.Typer()


@app.command()
def models(lake: LakeOption = None, as_json: JsonOption = False) -> None:
    """The models of a lake, the newest first: state, MAP@12, commit, and why they serve or not."""
    from hm_reco.registry.registry import model_rows

    with told():
        target = open_lake(lake)
        show(f"models of {target.root}", model_rows(target), as_json)


VersionArgument = Annotated[
    str, typer.Argument(help="Version of a model, as `hm models` lists it.")
]


ForceModelOption = Annotated[
    bool, typer.Option("--force", help="Against the rule; the registry remembers.")
]


@app.command()
def promote(
    version: VersionArgument, force: ForceModelOption = False, lake: LakeOption = None
) -> Lake:
    """Make a model champion, if it beats the champion and the best simple method."""
    from hm_reco.registry.registry import promote as make_champion
    from hm_reco.registry.registry import seen_at_once

    with told():
        target = open_lake(lake)
        with seen_at_once(target):
            verdict = make_champion(target, version, force)
        word = "is champion now" if verdict.allowed else "is champion now, by force"
        console.print(f"{version} {word}: {verdict}", highlight=False)
    return target


@app.command()
def rollback(lake: LakeOption = None) -> Lake:
    """Take back the last promotion: the champion before serves again."""
    from hm_reco.registry.registry import rollback as take_back
    from hm_reco.registry.registry import seen_at_once

    with told():
        target = open_lake(lake)
        with seen_at_once(target):
            before, now = take_back(target)
        console.print(f"{now} serves again, {before} is retired", highlight=False)
    return target


@app.command()
def recommend(customer_id: str, lake: LakeOption = None, as_json: JsonOption = False) -> None:
    """Show the articles that the last run recommends to a customer."""
    from hm_reco.serving.predictions import recommended

    with told():
        rows, known = recommended(open_lake(lake), customer_id)
        whom = f"{customer_id[:12]}…" if known else "a customer nobody knows"
        show(f"For {whom}", rows, as_json)


@app.command()
def submission(
    out: Annotated[Path, typer.Option(help="The CSV file to write.")], lake: LakeOption = None
) -> None:
    """Write all customers' 12 articles in Kaggle's submission format."""
    from hm_reco.serving.predictions import write_submission

    with told():
        rows = write_submission(open_lake(lake), out)
        console.print(f"{out}: {rows:,} customers", highlight=False)
