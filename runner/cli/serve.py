"""The command that serves the champion over REST."""

import os
from typing import Annotated

import typer

from hm_reco.lake.settings import ServiceSettings
from runner.cli.options import LakeOption, user_errors

app = typer.Typer()


@app.command()
def serve(
    lake: LakeOption = None,
    host: Annotated[str | None, typer.Option(help="Default: the setting `host`.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: the setting `port`.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Server processes.")] = 1,
) -> None:
    """Serve the champion over REST, and the reports: /healthz, /predict, /reports/."""
    import uvicorn

    from hm_reco.lake.logs import build_log_config

    if lake:
        os.environ["HM_LAKE"] = lake
    with user_errors():
        settings = ServiceSettings()
        settings.parse_key_hashes()
    uvicorn.run(
        "hm_reco.stages.inference:app",
        host=host or settings.host,
        port=port or settings.port,
        workers=workers,
        log_config=build_log_config(settings.log_level),
        access_log=False,  # the service logs its own responses
        server_header=False,
    )
