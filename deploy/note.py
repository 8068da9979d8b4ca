"""One line on the model that serves, for a commit message: python -m deploy.note MODELS.json.

The file is what `hm models --json` prints.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def note(models: Sequence[Mapping[str, Any]]) -> str:
    """The champion in words; that there is none, where there is none."""
    champion = next((one for one in models if one["state"].startswith("champion")), None)
    if champion is None:
        return "no model serves yet"
    return (
        f"model {champion['version']} ({champion['method']}), MAP@12 {champion['MAP@12']}, "
        f"knows all before {champion['as of']}"
    )


if __name__ == "__main__":
    print(note(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
