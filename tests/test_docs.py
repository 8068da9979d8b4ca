"""Each command in the guides exists with its options; the built site in a browser."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from runner.cli import app
from tests.conftest import find_accessibility_violations

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(hm [a-z][^`]*)`")


def list_commands(page: Path) -> list[str]:
    """Command lines that call `hm`, and inline `hm ...`."""
    text = page.read_text()
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    command_lines = [line for line in lines if re.match(r"(?:[A-Z_]+=\S+ )*hm ", line)]
    return [*command_lines, *INLINE.findall(BLOCK.sub("", text))]


COMMANDS_BY_PAGE = [(page, line) for page in PAGES for line in list_commands(page)]


def test_guides_contain_many_commands():
    assert len(COMMANDS_BY_PAGE) > 60 and len({page for page, _ in COMMANDS_BY_PAGE}) > 8


@pytest.mark.parametrize(
    "page", sorted({page for page, _ in COMMANDS_BY_PAGE}), ids=lambda page: page.stem
)
def test_guide_commands_and_options_exist(page: Path):
    group = typer.main.get_command(app)
    for line in list_commands(page):
        args = shlex.split(line, comments=True)
        args = args[args.index("hm") + 1 :]
        command = group
        while hasattr(command, "commands") and args and not args[0].startswith("-"):
            name = args.pop(0)
            assert name in command.commands, f"{page.name}: no command {name!r} in {line!r}"
            command = command.commands[name]
        known_options = {option for parameter in command.params for option in parameter.opts}
        used_options = {arg.partition("=")[0] for arg in args if re.match(r"--?[a-z]", arg)}
        assert used_options <= known_options, (
            f"{page.name}: {line!r}: no {used_options - known_options}"
        )


@pytest.mark.skipif(not SITE.is_dir(), reason="make docs has not built the site")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_site_works_offline_and_is_searchable(page, width, scheme):
    requested_urls: list[str] = []
    page.on("request", lambda request: requested_urls.append(request.url))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    for name in ("index.html", "docs/tutorial.html", "nbs/reporting/11_error_analysis.html"):
        page.goto((SITE / name).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert find_accessibility_violations(page) == [], name
    if width > 1000:
        page.goto((SITE / "index.html").as_uri())
        page.locator("input[name=query]").focus()
        page.get_by_text("Type to start searching").wait_for(state="attached")  # it is ready
        page.locator("input[name=query]").fill("promote champion")
        page.keyboard.press("End")  # the theme reads the query on keyup
        page.locator(".md-search-result__link", has_text="Promote a model").first.wait_for()
    assert {address.split(":")[0] for address in requested_urls} <= {"file", "data", "blob"}
