"""The workflow ci.yml, run here: python -m deploy.ci_dry_run [--root FOLDER].

`act` runs its jobs as processes on this machine, in a clone in which the last commit changed
nothing but an EDA notebook. Actions from elsewhere are stand-ins, and so is what `make` does: what
is rehearsed is which jobs run, for which components, and what the gate makes of it.
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
STUB_ACTION = """name: stand-in
description: in place of an action from elsewhere
runs: {using: composite, steps: [{run: echo stand-in, shell: bash}]}
"""
MAKEFILE = """docs test:
\t@echo made $@
.installed:
\t@mkdir -p .venv/bin && printf '#!/bin/sh\\necho "$$@" >> %s\\n' '{ran}' > .venv/bin/hm
\t@chmod +x .venv/bin/hm
"""
GIT_IDENTITY = ("-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost")


def _git(folder: Path, *args: str) -> str:
    command = ["git", "-C", str(folder), *GIT_IDENTITY, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def prepare_clone(root: Path, folder: Path, command_log: Path) -> tuple[str, str]:
    """A repository with two commits in `folder`; their names. `hm` notes its words in `command_log`."""
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
    """Run the workflow for a push: whether all went well, the words of each `hm`, and act's log.

    `base` is the commit before the push, by default the real one. The log lacks now and then what
    a short step printed last, so nothing is concluded from that.
    """
    with TemporaryDirectory(prefix="rehearsal-") as temporary:
        folder, stub, command_log = (
            Path(temporary) / name for name in ("checkout", "stand-in", "ran")
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
    """What goes otherwise than it should: for the push, and where detection fails."""
    passed, commands, log = run_workflow(root)
    if not passed or [command.split()[:3] for command in commands] != [
        ["run", "eda", "--upstream"]
    ]:
        state = "passed" if passed else "failed"
        yield f"a push that touches eda: {state}, ran {commands}\n{log[-3000:]}"
    _, _, log = run_workflow(root, base="1" * 40)
    if not all(re.search(rf"ci/{job}\b.*Job failed", log) for job in ("changed", "gate")):
        yield f"detection failed, and the gate let it pass\n{log[-3000:]}"


def main(argv: list[str] | None = None) -> int:
    """Rehearse; 1 when something goes wrong."""
    parser = argparse.ArgumentParser(prog="python -m deploy.ci_dry_run", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT)
    faults = list(find_faults(parser.parse_args(argv).root))
    print(*faults, sep="\n", end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
