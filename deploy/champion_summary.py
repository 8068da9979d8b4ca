"""One line on the model that serves, for a commit message: python -m deploy.champion_summary MODELS.json.

The file is what `hm models --json` prints.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def summarise_champion(models: Sequence[Mapping[str, Any]]) -> str:
    """The champion in words; that there is none, where there is none."""
    champion = next((model for model in models if model["state"].startswith("champion")), None)
    if champion is None:
        return "no model serves yet"
    return (
        f"model {champion['version']} ({champion['method']}), MAP@12 {champion['MAP@12']}, "
        f"knows all before {champion['as of']}"
    )


if __name__ == "__main__":
    print(summarise_champion(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
