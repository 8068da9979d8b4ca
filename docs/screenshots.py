"""Render the README's screenshots: SVG that contains the page, in light or dark.

python docs/screenshots.py LAKE      of a lake in which all stages have run, into docs/images/
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
WIDTH, PORT = 1080, 8765
TIDY_SCRIPT = """() => document.querySelectorAll("script, details > :not(summary), title")
  .forEach((element) => element.remove())"""
CUT_SCRIPT = """(low) => {
  const below = (element) => element.getBoundingClientRect().top + scrollY > low;
  [...document.body.querySelectorAll("*")].reverse().filter(below).forEach((e) => e.remove());
  return new XMLSerializer().serializeToString(document.documentElement);
}"""
NARROW_RULES = re.compile(r"@media \(max-width[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}")


def render_svg(page: Page, label: str, selector: str, height: int) -> str:
    """The part of a page that begins at the element `start`, as SVG."""
    page.evaluate(TIDY_SCRIPT)
    box = page.locator(selector).first.bounding_box()
    top = max(int(box["y"]) - 30, 0) if box else 0
    html = NARROW_RULES.sub("", re.sub(r"\s*\n\s*", "\n", page.evaluate(CUT_SCRIPT, top + height)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {WIDTH} {height}" '
        f'width="{WIDTH}" role="img" aria-label="{label}">'
        f'<foreignObject x="0" y="0" width="{WIDTH}" height="{top + height}">{html}</foreignObject>'
        "</svg>\n"
    )


def wait_for_url(url: str) -> None:
    """Return when a server responds at `url`."""
    for _ in range(300):
        try:
            urlopen(url).close()
            return
        except URLError:
            time.sleep(0.2)
    raise TimeoutError(url)


def main(lake: str) -> None:
    """Render all screenshots."""
    run_folder = max(
        path for path in Path(lake, "reports").iterdir() if (path / "training.html").exists()
    )
    root, report_path = f"http://127.0.0.1:{PORT}", f"/reports/{run_folder.name}"
    pages = [
        ("index", "/reports/", "h1", 640, "The index of a lake's reports"),
        (
            "training",
            f"{report_path}/training.html",
            "#By-segment",
            880,
            "A training's report: for whom",
        ),
        ("eda", f"{report_path}/eda.html", "#Articles", 860, "The report on the data: articles"),
        ("service", "/?q=trousers", "h1", 560, "The service's page"),
    ]
    IMAGES.mkdir(exist_ok=True)
    command = [str(Path(sys.executable).with_name("hm")), "serve", "--lake", lake]
    with (
        subprocess.Popen(command, env=os.environ | {"HM_PORT": str(PORT)}) as service,
        sync_playwright() as playwright,
    ):
        try:
            wait_for_url(f"{root}/readyz")
            chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for name, path, selector, height, label in pages:
                page = browser.new_page(viewport={"width": WIDTH, "height": 900})
                page.goto(root + path)
                (IMAGES / f"{name}.svg").write_text(render_svg(page, label, selector, height))
        finally:
            service.terminate()


if __name__ == "__main__":
    main(sys.argv[1])
