"""Dry run of the workflow ci.yml on this machine: python -m deploy.ci_dry_run [--root FOLDER].

`act` runs its jobs as local processes, in a clone whose last commit changed only an EDA notebook.
Stubs replace third-party actions and the commands of `make`: the dry run checks which jobs run,
for which components, and whether the gate blocks failures.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
ACT = ROOT / ".venv-delivery" / "bin" / "act"
WORKFLOW = ".github/workflows/ci.yml"
CHANGED_FILE = "nbs/reporting/06_baskets.ipynb"
STUB_ACTION = """name: stub
description: replaces a third-party action
runs: {using: composite, steps: [{run: echo stub, shell: bash}]}
"""
MAKEFILE = """docs test:
\t@echo made $@
.installed:
\t@mkdir -p .venv/bin && printf '#!/bin/sh\\necho "$$@" >> %s\\n' '{ran}' > .venv/bin/hm
\t@chmod +x .venv/bin/hm
"""
GIT_IDENTITY = ("-c", "user.name=dry-run", "-c", "user.email=dry-run@localhost")


def _git(folder: Path, *args: str) -> str:
    command = ["git", "-C", str(folder), *GIT_IDENTITY, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def prepare_clone(root: Path, folder: Path, command_log: Path) -> tuple[str, str]:
    """Create a repository with two commits in `folder` and return their ids.

    Its stub of `hm` appends its arguments to `command_log`.
    """
    files = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in (name for name in files if (root / name).is_file()):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / name).read_bytes())
    (folder / "Makefile").write_text(MAKEFILE.replace("{ran}", str(command_log)))
    _git(folder, "init", "--quiet", "--initial-branch=main")
    _git(folder, "add", "--all")
    _git(folder, "commit", "--quiet", "--message=before")
    changed_file = folder / CHANGED_FILE
    changed_file.write_text(changed_file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    _git(folder, "commit", "--quiet", "--all", "--message=after")
    return _git(folder, "rev-parse", "HEAD~1"), _git(folder, "rev-parse", "HEAD")


def run_workflow(root: Path, base: str = "") -> tuple[bool, list[str], str]:
    """Run the workflow for a push; returns success, the arguments of each `hm`, and act's log.

    `base` is the commit before the push (default: the real one). The log sometimes lacks the last
    output of a short step, so missing output proves nothing.
    """
    with TemporaryDirectory(prefix="ci-dry-run-") as temporary:
        folder, stub, command_log = (
            Path(temporary) / name for name in ("checkout", "stub", "commands")
        )
        folder.mkdir()
        stub.mkdir()
        (stub / "action.yml").write_text(STUB_ACTION)
        base_commit, head_commit = prepare_clone(root, folder, command_log)
        event = Path(temporary) / "event.json"
        event.write_text(
            json.dumps(
                {"before": base or base_commit, "after": head_commit, "ref": "refs/heads/main"}
            )
        )
        text = (folder / WORKFLOW).read_text(encoding="utf-8")
        options = ["--workflows", WORKFLOW, "--eventpath", str(event)]
        for image in sorted({*re.findall(r"runs-on: (\S+)", text)}):
            options += ["--platform", f"{image}=-self-hosted"]
        for action in sorted({*re.findall(r"uses: ([\w.-]+/[\w.-]+@\S+)", text)}):
            options += ["--local-repository", f"{action}={stub}"]
        result = subprocess.run(
            [str(ACT), "push", *options],
            cwd=folder,
            env=os.environ | {"XDG_CACHE_HOME": temporary, "HOME": temporary},
            check=False,
            capture_output=True,
            text=True,
        )
        commands = command_log.read_text().splitlines() if command_log.exists() else []
        return result.returncode == 0, commands, result.stdout + result.stderr


def find_faults(root: Path) -> Iterator[str]:
    """Find faults in the runs for a push and for a failed detection."""
    passed, commands, log = run_workflow(root)
    if not passed or [command.split()[:3] for command in commands] != [
        ["run", "eda", "--upstream"]
    ]:
        state = "passed" if passed else "failed"
        yield f"a push that affects eda: {state}, ran {commands}\n{log[-3000:]}"
    _, _, log = run_workflow(root, base="1" * 40)
    if not all(re.search(rf"ci/{job}\b.*Job failed", log) for job in ("changed", "gate")):
        yield f"the gate passed after a failed detection\n{log[-3000:]}"


def main(argv: list[str] | None = None) -> int:
    """Run the dry run; returns 1 when it finds a fault."""
    parser = argparse.ArgumentParser(prog="python -m deploy.ci_dry_run", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT)
    faults = list(find_faults(parser.parse_args(argv).root))
    print(*faults, sep="\n", end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
