"""Build an image's tags from the pushed ref: python -m deploy.tag --ref refs/heads/main --sha SHA.

`--version` prints instead the checkout's version, from the last git tag.

Tags with a commit never move; moving tags (`--moving`) are for registries that allow them.
"""

import argparse
import re
import sys
from pathlib import Path

from hm_reco.lake.fingerprint import get_package_version

SHA_PATTERN = re.compile(r"[0-9a-f]{40}")
MAX_TAG_LENGTH = 128  # OCI distribution specification
SHORT_SHA_LENGTH = 7


def to_tag_part(branch: str) -> str:
    """Convert a branch's name to a part of a tag, without characters that a tag must not have.

    Raises `ValueError` if no character is left.
    """
    safe = re.sub(r"[^A-Za-z0-9_.]+", "-", branch).strip("-.")
    if not safe:
        raise ValueError(f"branch {branch!r}: no character is valid in an image tag")
    return safe[: MAX_TAG_LENGTH - len("-") - 40].rstrip("-.")


def build_tags(
    ref: str, sha: str, pull_request: int | None = None, moving: bool = False
) -> list[str]:
    """Build all tags, the one with the full commit first. Raises `ValueError`."""
    if not SHA_PATTERN.fullmatch(sha):
        raise ValueError(f"commit {sha!r}: expected 40 hexadecimal digits")
    if pull_request is None and not ref.startswith("refs/heads/"):
        raise ValueError(
            f"ref {ref!r}: expected refs/heads/BRANCH, or the number of a pull request"
        )
    if pull_request is not None:
        name = f"pr-{pull_request}"
    else:
        name = to_tag_part(ref.removeprefix("refs/heads/"))
    tags = [f"{name}-{sha}", f"{name}-{sha[:SHORT_SHA_LENGTH]}"]
    if moving and pull_request is not None:
        tags.append(name)
    elif moving and name in ("main", "develop"):
        tags.append(f"{name}-latest")
    return tags


def main(argv: list[str] | None = None) -> int:
    """Print the tags, one per line."""
    parser = argparse.ArgumentParser(prog="python -m deploy.tag", description=__doc__)
    parser.add_argument(
        "--version", action="version", version=get_package_version(Path(__file__).parents[1])
    )
    parser.add_argument("--ref", required=True, help="the ref as in GITHUB_REF: refs/heads/main")
    parser.add_argument("--sha", required=True, help="the commit, 40 hexadecimal digits")
    parser.add_argument("--pull-request", type=int, help="number of the pull request")
    parser.add_argument("--moving", action="store_true", help="also main-latest, pr-12")
    args = parser.parse_args(argv)
    try:
        print(*build_tags(args.ref, args.sha, args.pull_request, args.moving), sep="\n")
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
