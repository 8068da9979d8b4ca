"""Print the results of a run on a terminal: methods, examples, alerts."""

import json
from collections.abc import Mapping
from typing import Any

import typer

from hm_reco.lake.storage import Lake
from runner.cli.options import (
    console,
    print_rows,
)


def show_alerts(lake: Lake, fail_on: str = "") -> None:
    """Print the alerts of the latest data report; exit code 1 at level `fail_on` or above."""
    from hm_reco.lake.runs import read_runs

    reports = [e.report for e in read_runs(lake) if e.stage == "eda" and e.report]
    if not reports:
        raise LookupError(f"no data report in {lake.root}: hm eda --lake {lake.root}")
    path = lake.path(*reports[-1].removesuffix(".html").split("/")).with_suffix(".json")
    alerts = [
        {"level": alert["level"], "section": section["title"], "text": alert["text"]}
        for section in json.loads(path.read_text())["sections"]
        for alert in section["alerts"]
    ]
    print_rows("Alerts" if alerts else "No alerts.", alerts)
    console.print(f"report  {path.with_suffix('.html')}", soft_wrap=True, highlight=False)
    if any(fail_on in ("warning", row["level"]) for row in alerts):
        raise typer.Exit(1)


def show_results(lake: Lake, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the metrics of training and inference, if present in `metrics` (by stage)."""
    from hm_reco.serving.predictions import read_recommendations

    if training := metrics.get("training"):
        rows = [
            {
                "method": name,
                training["metric"]: f"{mean:.4f}",
                "95 % interval": f"{low:.4f} .. {high:.4f}",
            }
            for name, (mean, low, high) in training["scores"].items()
        ]
        weeks = f"{training['customer_weeks']:,} customer-weeks"
        print_rows(f"Before {training['as_of']}, {weeks}", rows)
        mean, low, high = training["improvement"]
        label = f"improvement of the ranker over {training['best_baseline']!r}"
        line = f"{label}: {mean:.4f} ({low:.4f} .. {high:.4f})"
        console.print(line, highlight=False, soft_wrap=True)
        console.print(f"{training['promotion']}\n", highlight=False)
    for group, customer_id in metrics.get("inference", {}).get("examples", {}).items():
        rows, _ = read_recommendations(lake, customer_id)
        print_rows(f"For a {group} customer, {customer_id[:12]}…", rows[:4])
