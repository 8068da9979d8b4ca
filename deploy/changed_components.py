"""Detect components affected by a change: deploy.changed_components --base SHA [--head SHA].

Prints a JSON list for a workflow's matrix. A component is a stage. Its notebook, the modules that
the notebook needs (and their notebooks) and common files affect it. An unknown file affects all
components: an unnecessary image is better than a stale one. Needs only Python.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from hm_reco.lake.fingerprint import fingerprint_notebook

ROOT = Path(__file__).parents[1]
NO_BASE = "0" * 40  # GitHub's base commit of a new branch
UNBUILT_PATHS = ("docs/", "tests/", "bench/", "nbs/explore/", ".github/", "deploy/", "config/")
BUILT_PATHS = ("deploy/entrypoint.sh",)
UNBUILT_FILES = re.compile(
    r"nbs/00_start\.ipynb|hm_reco/_modidx\.py|[A-Z]+\.md|LICENSE|mkdocs\.yml|\.(?!dockerignore).*"
)
BASE_MODULES = ("hm_reco.lake.", "hm_reco.api.warm_up")  # part of every image
EXPORT_DIRECTIVE = re.compile(r"^#\| default_exp ([\w.]+)$", re.MULTILINE)


class DetectionError(RuntimeError):
    """The changed files cannot be determined."""


def list_components(root: Path = ROOT) -> dict[str, Path]:
    """List each stage with its notebook."""
    paths = sorted((root / "nbs" / "stages").glob("[1-9]*.ipynb"))
    return {path.stem.partition("_")[2]: path for path in paths}


def _find_module(path: str, root: Path) -> str | None:
    """Return the module that a notebook exports or that a library file defines, or None."""
    if path.startswith("hm_reco/") and path.endswith(".py"):
        return path.removesuffix(".py").replace("/", ".")
    if path.startswith("nbs/") and (root / path).is_file():
        cells = json.loads((root / path).read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            if match := EXPORT_DIRECTIVE.search("".join(cell["source"])):
                return f"hm_reco.{match[1]}"
    return None


def find_affected(files: Iterable[str], root: Path = ROOT) -> list[str]:
    """Find the components affected by changed files, in the pipeline's order."""
    stages = list_components(root)
    dependencies = {
        name: {f"hm_reco.stages.{name}", *fingerprint_notebook(path)["library"]}
        for name, path in stages.items()
    }
    affected: set[str] = set()
    for path in files:
        is_unbuilt = path.startswith(UNBUILT_PATHS) and path not in BUILT_PATHS
        if is_unbuilt or UNBUILT_FILES.fullmatch(path):
            continue
        module = _find_module(path, root)
        if module is None or module.startswith(BASE_MODULES):
            return list(stages)
        affected |= {name for name in stages if module in dependencies[name]}
    return [name for name in stages if name in affected]


def list_changed_files(base: str, head: str, root: Path = ROOT) -> list[str] | None:
    """List the files changed since the merge base; None without a base: all files count.

    Raises `DetectionError`.
    """
    if base in ("", NO_BASE):
        return None
    command = ["git", "-C", str(root), "diff", "--name-only", "-z", f"{base}...{head}"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise DetectionError(f"git cannot compare {base} and {head}: {result.stderr.strip()}")
    return [path for path in result.stdout.split("\0") if path]


def main(argv: list[str] | None = None) -> int:
    """Print the affected components as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.changed_components", description=__doc__
    )
    parser.add_argument("--base", required=True, help=f"base commit; {NO_BASE} or empty: none")
    parser.add_argument("--head", default="HEAD")
    parser.add_argument("--only", help="print only this component, if affected")
    parser.add_argument("--without", help="omit this component")
    args = parser.parse_args(argv)
    try:
        files = list_changed_files(args.base, args.head)
    except DetectionError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    selected = list(list_components()) if files is None else find_affected(files)
    if args.only:
        selected = [name for name in selected if name == args.only]
    print(json.dumps([name for name in selected if name != args.without]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
