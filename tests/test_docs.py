"""The guides: each command that they name exists, with its options; the built site in a browser."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from runner.cli import app
from tests.conftest import faults

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(hm [a-z][^`]*)`")


def commands(page: Path) -> list[str]:
    """Lines that call `hm`, and `hm ...` within sentences."""
    text = page.read_text()
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    called = [line for line in lines if re.match(r"(?:[A-Z_]+=\S+ )*hm ", line)]
    return [*called, *INLINE.findall(BLOCK.sub("", text))]


NAMED = [(page, line) for page in PAGES for line in commands(page)]


def test_the_guides_name_many_commands():
    assert len(NAMED) > 60 and len({page for page, _ in NAMED}) > 8


@pytest.mark.parametrize("page", sorted({page for page, _ in NAMED}), ids=lambda page: page.stem)
def test_commands_of_the_guides_exist_with_their_options(page: Path):
    group = typer.main.get_command(app)
    for line in commands(page):
        words = shlex.split(line, comments=True)
        words = words[words.index("hm") + 1 :]
        command = group
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            name = words.pop(0)
            assert name in command.commands, f"{page.name}: no command {name!r} in {line!r}"
            command = command.commands[name]
        known = {option for parameter in command.params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= known, f"{page.name}: {line!r}: no {given - known}"


@pytest.mark.skipif(not SITE.is_dir(), reason="make docs has not built the site")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_the_site_is_whole_without_a_network_and_found_in(page, width, scheme):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    for name in ("index.html", "docs/tutorial.html", "nbs/model/20_cases.html"):
        page.goto((SITE / name).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert faults(page) == [], name
    if width > 1000:
        page.goto((SITE / "index.html").as_uri())
        page.locator("input[name=query]").focus()
        page.get_by_text("Type to start searching").wait_for(state="attached")  # it is ready
        page.locator("input[name=query]").fill("promote champion")
        page.keyboard.press("End")  # the theme looks at what is typed when a key comes up
        page.locator(".md-search-result__link", has_text="Promote a model").first.wait_for()
    assert {address.split(":")[0] for address in asked} <= {"file", "data", "blob"}
