"""Summarise the champion in one line for a commit message: deploy.champion_summary MODELS.json.

The file has the output of `hm models --json`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def summarise_champion(models: Sequence[Mapping[str, Any]]) -> str:
    """Describe the champion, or report that there is none."""
    champion = next((model for model in models if model["state"].startswith("champion")), None)
    if champion is None:
        return "no champion yet"
    return (
        f"model {champion['version']} ({champion['method']}), MAP@12 {champion['MAP@12']}, "
        f"cut-off date {champion['as of']}"
    )


if __name__ == "__main__":
    print(summarise_champion(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
