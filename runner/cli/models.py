"""Commands on models and recommendations."""

from pathlib import Path
from typing import Annotated

import typer

from hm_reco.lake.storage import Lake, open_lake
from runner.cli.options import JsonOption, LakeOption, console, print_rows, user_errors

app = typer.Typer()


@app.command()
def models(lake: LakeOption = None, as_json: JsonOption = False) -> None:
    """List the models of a lake, the latest first: state, score, commit, promotion result."""
    from hm_reco.registry.registry import build_model_rows

    with user_errors():
        target = open_lake(lake)
        print_rows(f"models of {target.root}", build_model_rows(target), as_json)


@app.command()
def features(as_json: JsonOption = False) -> None:
    """List the ranker's features: name, meaning, unit, window, reason, since when leak-safe."""
    from hm_reco.ranking.features import build_catalogue

    rows = build_catalogue().to_dicts()
    print_rows(f"{len(rows)} features of a candidate", rows, as_json)


VersionArgument = Annotated[
    str, typer.Argument(help="Version of a model, as `hm models` lists it.")
]


ForceModelOption = Annotated[
    bool, typer.Option("--force", help="Skip the promotion check; the registry records it.")
]


@app.command()
def promote(
    version: VersionArgument, force: ForceModelOption = False, lake: LakeOption = None
) -> Lake:
    """Promote a model to champion, if it beats the champion and the best baseline."""
    from hm_reco.registry.registry import promote as promote_model
    from hm_reco.registry.registry import publish_immediately

    with user_errors():
        target = open_lake(lake)
        with publish_immediately(target):
            check = promote_model(target, version, force)
        outcome = "is champion now" if check.allowed else "is champion now, by force"
        console.print(f"{version} {outcome}: {check}", highlight=False)
    return target


@app.command()
def rollback(lake: LakeOption = None) -> Lake:
    """Undo the last promotion: the previous champion serves again."""
    from hm_reco.registry.registry import publish_immediately
    from hm_reco.registry.registry import rollback as roll_back

    with user_errors():
        target = open_lake(lake)
        with publish_immediately(target):
            previous, current = roll_back(target)
        console.print(f"{current} serves again, {previous} is retired", highlight=False)
    return target


@app.command()
def recommend(customer_id: str, lake: LakeOption = None, as_json: JsonOption = False) -> None:
    """Print the articles that the last run recommends to a customer."""
    from hm_reco.serving.predictions import read_recommendations

    with user_errors():
        rows, is_known = read_recommendations(open_lake(lake), customer_id)
        customer_label = f"{customer_id[:12]}…" if is_known else "an unknown customer"
        print_rows(f"For {customer_label}", rows, as_json)


@app.command()
def submission(
    out: Annotated[Path, typer.Option(help="The CSV file to write.")], lake: LakeOption = None
) -> None:
    """Write all customers' 12 articles in Kaggle's submission format."""
    from hm_reco.serving.predictions import write_submission

    with user_errors():
        rows = write_submission(open_lake(lake), out)
        console.print(f"{out}: {rows:,} customers", highlight=False)
