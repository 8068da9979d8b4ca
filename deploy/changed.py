"""Which components a change touches: python -m deploy.changed --base SHA [--head SHA].

Prints a JSON list for a workflow's matrix. A component is a stage; it is touched by its notebook,
by the modules that this needs (their notebooks, too), and by what all have in common. A file that
nobody knows touches all: better an image too many than a stale one. Needs Python alone.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from hm_reco.lake.fingerprint import code_key

ROOT = Path(__file__).parents[1]
NO_BASE = "0" * 40  # what GitHub names as the base of a new branch
IN_NO_IMAGE = ("docs/", "tests/", "bench/", "nbs/explore/", ".github/", "deploy/", "config/")
IN_IMAGES = ("deploy/entrypoint.sh",)
NOT_BUILT = re.compile(
    r"nbs/00_start\.ipynb|hm_reco/_modidx\.py|[A-Z]+\.md|LICENSE|mkdocs\.yml|\.(?!dockerignore).*"
)
GROUND = ("hm_reco.lake.", "hm_reco.api.warm_up")  # part of every image
EXPORTED = re.compile(r"^#\| default_exp ([\w.]+)$", re.MULTILINE)


class DetectionError(RuntimeError):
    """What has changed cannot be told."""


def components(root: Path = ROOT) -> dict[str, Path]:
    """Each stage and its notebook."""
    paths = sorted((root / "nbs" / "stages").glob("[1-9]*.ipynb"))
    return {path.stem.partition("_")[2]: path for path in paths}


def _module_of(path: str, root: Path) -> str | None:
    """The module that a notebook exports, or that a file of the library is."""
    if path.startswith("hm_reco/") and path.endswith(".py"):
        return path.removesuffix(".py").replace("/", ".")
    if path.startswith("nbs/") and (root / path).is_file():
        cells = json.loads((root / path).read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            if found := EXPORTED.search("".join(cell["source"])):
                return f"hm_reco.{found[1]}"
    return None


def touched(changed: Iterable[str], root: Path = ROOT) -> list[str]:
    """The components that changed files touch, in the pipeline's order."""
    stages = components(root)
    needs = {
        name: {f"hm_reco.stages.{name}", *code_key(path)["library"]}
        for name, path in stages.items()
    }
    found: set[str] = set()
    for path in changed:
        unbuilt = path.startswith(IN_NO_IMAGE) and path not in IN_IMAGES
        if unbuilt or NOT_BUILT.fullmatch(path):
            continue
        module = _module_of(path, root)
        if module is None or module.startswith(GROUND):
            return list(stages)
        found |= {name for name in stages if module in needs[name]}
    return [name for name in stages if name in found]


def changed_files(base: str, head: str, root: Path = ROOT) -> list[str] | None:
    """Files that differ since the two parted; None: there is no base, so all count.

    Raises `DetectionError`.
    """
    if base in ("", NO_BASE):
        return None
    command = ["git", "-C", str(root), "diff", "--name-only", "-z", f"{base}...{head}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise DetectionError(f"git cannot compare {base} and {head}: {done.stderr.strip()}")
    return [path for path in done.stdout.split("\0") if path]


def main(words: list[str] | None = None) -> int:
    """Print the touched components as JSON."""
    parser = argparse.ArgumentParser(prog="python -m deploy.changed", description=__doc__)
    parser.add_argument("--base", required=True, help=f"commit before; {NO_BASE} or empty: none")
    parser.add_argument("--head", default="HEAD")
    parser.add_argument("--only", help="this component, or none")
    parser.add_argument("--without", help="all but this component")
    given = parser.parse_args(words)
    try:
        files = changed_files(given.base, given.head)
    except DetectionError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    found = list(components()) if files is None else touched(files)
    if given.only:
        found = [name for name in found if name == given.only]
    print(json.dumps([name for name in found if name != given.without]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
