"""The workflow ci.yml, run here: python -m deploy.rehearse [--root FOLDER].

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
TOUCHED = "nbs/reporting/06_baskets.ipynb"
STAND_IN = """name: stand-in
description: in place of an action from elsewhere
runs: {using: composite, steps: [{run: echo stand-in, shell: bash}]}
"""
MAKEFILE = """docs test:
\t@echo made $@
.installed:
\t@mkdir -p .venv/bin && printf '#!/bin/sh\\necho "$$@" >> %s\\n' '{ran}' > .venv/bin/hm
\t@chmod +x .venv/bin/hm
"""
ME = ("-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost")


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *ME, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def stage_set(root: Path, folder: Path, ran: Path) -> tuple[str, str]:
    """A repository with two commits in `folder`; their names. `hm` notes its words in `ran`."""
    files = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in (name for name in files if (root / name).is_file()):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / name).read_bytes())
    (folder / "Makefile").write_text(MAKEFILE.replace("{ran}", str(ran)))
    _git(folder, "init", "--quiet", "--initial-branch=main")
    _git(folder, "add", "--all")
    _git(folder, "commit", "--quiet", "--message=before")
    touched = folder / TOUCHED
    touched.write_text(touched.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    _git(folder, "commit", "--quiet", "--all", "--message=after")
    return _git(folder, "rev-parse", "HEAD~1"), _git(folder, "rev-parse", "HEAD")


def perform(root: Path, base: str = "") -> tuple[bool, list[str], str]:
    """Run the workflow for a push: whether all went well, the words of each `hm`, and act's log.

    `base` is the commit before the push, by default the real one. The log lacks now and then what
    a short step printed last, so nothing is concluded from that.
    """
    with TemporaryDirectory(prefix="rehearsal-") as place:
        folder, stand_in, ran = (Path(place) / name for name in ("checkout", "stand-in", "ran"))
        folder.mkdir()
        stand_in.mkdir()
        (stand_in / "action.yml").write_text(STAND_IN)
        before, after = stage_set(root, folder, ran)
        event = Path(place) / "event.json"
        event.write_text(
            json.dumps({"before": base or before, "after": after, "ref": "refs/heads/main"})
        )
        text = (folder / WORKFLOW).read_text(encoding="utf-8")
        options = ["--workflows", WORKFLOW, "--eventpath", str(event)]
        for image in sorted({*re.findall(r"runs-on: (\S+)", text)}):
            options += ["--platform", f"{image}=-self-hosted"]
        for action in sorted({*re.findall(r"uses: ([\w.-]+/[\w.-]+@\S+)", text)}):
            options += ["--local-repository", f"{action}={stand_in}"]
        done = subprocess.run(
            [str(ACT), "push", *options],
            cwd=folder,
            env=os.environ | {"XDG_CACHE_HOME": place, "HOME": place},
            check=False,
            capture_output=True,
            text=True,
        )
        words = ran.read_text().splitlines() if ran.exists() else []
        return done.returncode == 0, words, done.stdout + done.stderr


def faults(root: Path) -> Iterator[str]:
    """What goes otherwise than it should: for the push, and where detection fails."""
    good, ran, told = perform(root)
    if not good or [words.split()[:3] for words in ran] != [["run", "eda", "--upstream"]]:
        state = "passed" if good else "failed"
        yield f"a push that touches eda: {state}, ran {ran}\n{told[-3000:]}"
    _, _, told = perform(root, base="1" * 40)
    if not all(re.search(rf"ci/{job}\b.*Job failed", told) for job in ("changed", "gate")):
        yield f"detection failed, and the gate let it pass\n{told[-3000:]}"


def main(words: list[str] | None = None) -> int:
    """Rehearse; 1 when something goes wrong."""
    parser = argparse.ArgumentParser(prog="python -m deploy.rehearse", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT)
    found = list(faults(parser.parse_args(words).root))
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
