"""Tell the GitOps repository which image serves: python -m deploy.gitops set --help.

Works on a fresh clone, commits, and pushes; when somebody else has pushed in between, it begins
again on top of that. The token comes from GITOPS_REPO_TOKEN and never becomes part of a command
line, a remote's address or a message.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
MAX_ATTEMPTS = 6
AUTHOR = ("hm-reco delivery", "delivery@users.noreply.github.com")
Change = Callable[[Path], None]


class GitOpsError(RuntimeError):
    """The repository could not be told."""


def set_image(kustomization: Path, name: str, image: str, digest: str, tag: str = "") -> None:
    """Make a kustomization use `image@digest` where its base says `name`; all else stays.

    `tag` is kept as a comment, for people. Raises `GitOpsError`.
    """
    if not DIGEST_PATTERN.fullmatch(digest):
        raise GitOpsError(f"digest {digest!r}: expected sha256: and 64 hexadecimal digits")
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    try:
        content = yaml.load(kustomization.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise GitOpsError(f"no file {kustomization.name} at {kustomization.parent}") from err
    except YAMLError as err:
        raise GitOpsError(f"{kustomization.name} is no YAML: {err}") from err
    if not isinstance(content, CommentedMap):
        raise GitOpsError(f"{kustomization.name}: expected a kustomization, found no mapping")
    images = content.setdefault("images", [])
    entry = next((image_entry for image_entry in images if image_entry.get("name") == name), None)
    if entry is None:
        entry = CommentedMap({"name": name})
        images.append(entry)
    entry.pop("newTag", None)
    entry["newName"], entry["digest"] = image, digest
    if tag:
        entry.yaml_add_eol_comment(tag, "digest")
    with kustomization.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)


def _build_environment() -> dict[str, str]:
    """Git's environment: the token as a header for https, never in an argument."""
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    if token := environment.pop("GITOPS_REPO_TOKEN", ""):
        basic = b64encode(f"x-access-token:{token}".encode()).decode()
        environment |= {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "http.extraHeader",
            "GIT_CONFIG_VALUE_0": f"Authorization: Basic {basic}",
        }
    return environment


def run_git(folder: Path, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Call git in a clone. Raises `GitOpsError` with what it said."""
    identity = ["-c", f"user.name={AUTHOR[0]}", "-c", f"user.email={AUTHOR[1]}"]
    result = subprocess.run(
        ["git", "-C", str(folder), *identity, *args],
        env=_build_environment(),
        check=False,
        capture_output=True,
        text=True,
    )
    if check and result.returncode:
        raise GitOpsError(f"git {args[0]}: {result.stderr.strip()[-500:]}")
    return result


def publish_change(
    repository: str,
    branch: str,
    change: Change,
    message: str,
    onto: str = "",
    pause_seconds: float = 1.0,
) -> str:
    """Commit a change on top of `branch` and push it there, or as the branch `onto`.

    Returns the commit; empty when there was nothing to change. Pushed to in between, it begins
    again: the change is made anew on what is there now. Raises `GitOpsError`.
    """
    with TemporaryDirectory(prefix="gitops-") as folder:
        clone = Path(folder)
        run_git(clone, "clone", "--quiet", "--depth", "1", "--branch", branch, repository, ".")
        for attempt in range(MAX_ATTEMPTS):
            change(clone)
            run_git(clone, "add", "--all")
            if not run_git(clone, "status", "--porcelain").stdout:
                return ""
            run_git(clone, "commit", "--quiet", "--message", message)
            if push(clone, onto or branch, force=bool(onto)):
                return run_git(clone, "rev-parse", "HEAD").stdout.strip()
            time.sleep(pause_seconds * (attempt + random.random()))
            run_git(clone, "fetch", "--quiet", "--depth", "1", "origin", branch)
            run_git(clone, "reset", "--quiet", "--hard", "FETCH_HEAD")
        raise GitOpsError(
            f"{branch}: others pushed {MAX_ATTEMPTS} times in between; try again later"
        )


def push(clone: Path, branch: str, force: bool = False) -> bool:
    """Push; False when somebody else was there first. Raises `GitOpsError` for anything else."""
    args = ["push", "--quiet", *(["--force"] if force else []), "origin", f"HEAD:{branch}"]
    result = run_git(clone, *args, check=False)
    if result.returncode == 0:
        return True
    if re.search(
        r"non-fast-forward|fetch first|failed to update ref|cannot lock ref", result.stderr
    ):
        return False
    raise GitOpsError(f"git push: {result.stderr.strip()[-500:]}")


def format_message(component: str, tag: str, note: str = "") -> str:
    """What the commit says: what serves from now on, and how good it was judged to be."""
    subject = f"deploy({component}): {tag}"
    return f"{subject}\n\n{note}" if note else subject


def write_preview(overlay: Path, template: Path, number: int) -> None:
    """An overlay of a pull request's own, from the staging one: other names, one replica.

    Raises `GitOpsError` when there is no overlay to begin from.
    """
    if not (template / "kustomization.yaml").is_file():
        raise GitOpsError(f"no overlay {template.name} to make a preview from")
    yaml = YAML()
    content: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "nameSuffix": f"-pr-{number}",
        "resources": [f"../{template.name}"],
    }
    overlay.mkdir(parents=True, exist_ok=True)
    if not (overlay / "kustomization.yaml").exists():
        with (overlay / "kustomization.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(content, file)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.gitops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in (("set", "an overlay's image"), ("remove", "a preview's overlay")):
        command = commands.add_parser(name, help=description)
        command.add_argument("--repository", required=True, help="address of the GitOps repository")
        command.add_argument("--branch", default="main")
        command.add_argument("--app", required=True, help="folder with overlays/ in it")
        command.add_argument("--overlay", required=True, help="production, staging or pr-NUMBER")
        command.add_argument("--component", default="inference")
    set_command = commands.choices["set"]
    set_command.add_argument("--image", required=True, help="registry/repository, without a tag")
    set_command.add_argument(
        "--name", default="ml-fashion-recommender/inference", help="in the base"
    )
    set_command.add_argument("--digest", required=True)
    set_command.add_argument("--tag", required=True, help="for people; the digest decides")
    set_command.add_argument("--note", default="", help="second paragraph of the message: metrics")
    set_command.add_argument("--onto", default="", help="push as this branch, for a pull request")
    return parser


def _build_change(args: argparse.Namespace) -> tuple[Change, str]:
    """What to do in a clone, and the message."""

    def apply_image(clone: Path) -> None:
        overlays = clone / args.app / "overlays"
        if number := re.fullmatch(r"pr-(\d+)", args.overlay):
            write_preview(overlays / args.overlay, overlays / "staging", int(number[1]))
        file = overlays / args.overlay / "kustomization.yaml"
        set_image(file, args.name, args.image, args.digest, args.tag)

    def remove_overlay(clone: Path) -> None:
        run_git(
            clone,
            "rm",
            "-r",
            "--quiet",
            "--ignore-unmatch",
            f"{args.app}/overlays/{args.overlay}",
        )

    if args.command == "remove":
        return remove_overlay, format_message(args.component, f"remove preview {args.overlay}")
    return apply_image, format_message(args.component, args.tag, args.note)


def main(argv: list[str] | None = None) -> int:
    """Do it, and print the commit."""
    args = _build_parser().parse_args(argv)
    if args.command == "remove" and not re.fullmatch(r"pr-\d+", args.overlay):
        print(f"error: overlay {args.overlay!r}: only previews are removed", file=sys.stderr)
        return 1
    change, message = _build_change(args)
    try:
        commit = publish_change(
            args.repository, args.branch, change, message, vars(args).get("onto", "")
        )
    except GitOpsError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print(commit or "nothing to do: the repository says so already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
