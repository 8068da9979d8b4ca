"""Set the deployed image in the GitOps repository: python -m deploy.gitops set --help.

Works on a fresh clone, commits and pushes; after a concurrent push it starts again from the new
commit. The token comes from GITOPS_REPO_TOKEN and never appears in a command line, a remote's URL
or a message.
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
    """The GitOps repository could not be changed."""


def set_image(kustomization: Path, name: str, image: str, digest: str, tag: str = "") -> None:
    """Make a kustomization replace the base's image `name` with `image@digest`.

    `tag` becomes a comment for readers. Raises `GitOpsError`.
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
        raise GitOpsError(f"{kustomization.name} is not valid YAML: {err}") from err
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
    """Build git's environment with the token as an https header, never as an argument."""
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
    """Run git in a clone. Raises `GitOpsError` with its error output."""
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
    """Commit a change on top of `branch` and push it to `branch`, or to the branch `onto`.

    Returns the commit; empty when nothing changed. After a concurrent push it applies the change
    again to the new commit. Raises `GitOpsError`.
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
            f"{branch}: {MAX_ATTEMPTS} attempts failed due to concurrent pushes; try again later"
        )


def push(clone: Path, branch: str, force: bool = False) -> bool:
    """Push; returns False after a concurrent push. Raises `GitOpsError` for other errors."""
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
    """Format the commit message: the deployed tag, and a note on the model's evaluation."""
    subject = f"deploy({component}): {tag}"
    return f"{subject}\n\n{note}" if note else subject


def write_preview(overlay: Path, template: Path, number: int) -> None:
    """Write a pull request's overlay, derived from the `template` overlay with a name suffix.

    Raises `GitOpsError` when the template does not exist.
    """
    if not (template / "kustomization.yaml").is_file():
        raise GitOpsError(f"no overlay {template.name} to derive a preview from")
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
        command.add_argument("--repository", required=True, help="URL of the GitOps repository")
        command.add_argument("--branch", default="main")
        command.add_argument("--app", required=True, help="folder with overlays/ in it")
        command.add_argument("--overlay", required=True, help="production, staging or pr-NUMBER")
        command.add_argument("--component", default="inference")
    set_command = commands.choices["set"]
    set_command.add_argument("--image", required=True, help="registry/repository, without a tag")
    set_command.add_argument(
        "--name", default="ml-fashion-recommender/inference", help="image name in the base"
    )
    set_command.add_argument("--digest", required=True)
    set_command.add_argument(
        "--tag", required=True, help="comment for readers; the digest selects the image"
    )
    set_command.add_argument("--note", default="", help="second paragraph of the message: metrics")
    set_command.add_argument("--onto", default="", help="push as this branch, for a pull request")
    return parser


def _build_change(args: argparse.Namespace) -> tuple[Change, str]:
    """Build the change to a clone and its commit message."""

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
    """Publish the change and print the commit."""
    args = _build_parser().parse_args(argv)
    if args.command == "remove" and not re.fullmatch(r"pr-\d+", args.overlay):
        print(f"error: overlay {args.overlay!r}: only previews can be removed", file=sys.stderr)
        return 1
    change, message = _build_change(args)
    try:
        commit = publish_change(
            args.repository, args.branch, change, message, vars(args).get("onto", "")
        )
    except GitOpsError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print(commit or "nothing to do: the repository is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
