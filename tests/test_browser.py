"""The pages in a real browser, as a person with a keyboard and one with a phone see them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page

from hm_reco.data.history import load_history
from hm_reco.stages.inference import select_example_customers
from tests.conftest import faults, free_port, wait_for

HM = str(Path(sys.executable).with_name("hm"))
QUICK = ("evaluation_weeks=2", "training_weeks=2", "tower_examples=0", "rounds=30")


@pytest.fixture(scope="module")
def root(trained_lake, tmp_path_factory) -> str:
    """A lake in which the data were looked at and two models were trained."""
    lake = str(tmp_path_factory.mktemp("read") / "lake")
    shutil.copytree(trained_lake.root, lake)
    given = [part for one in QUICK for part in ("-p", f"training.{one}")]
    for more in (["eda", "training"], ["training", "-p", "seed=1"]):
        subprocess.run([HM, "run", *more, "--lake", lake, *given], check=True, capture_output=True)
    return lake


@pytest.fixture(scope="module")
def url(root):
    command = [HM, "serve", "--lake", root]
    port = free_port()
    with subprocess.Popen(
        command, env=os.environ | {"HM_PORT": str(port)}, stderr=subprocess.DEVNULL
    ) as it:
        wait_for(f"http://127.0.0.1:{port}/readyz")
        yield f"http://127.0.0.1:{port}/"
        it.terminate()


def articles(page: Page) -> list[str]:
    return page.locator("section.ranked .goods a").evaluate_all("all => all.map(a => a.title)")


def test_by_keyboard_from_a_search_to_a_session(url, page, trained_lake):
    loyal = select_example_customers(load_history(trained_lake))["loyal"]
    page.goto(url)
    page.keyboard.type(loyal)  # the search has the focus
    page.keyboard.press("Enter")
    page.wait_for_url("**q=**")
    plain = articles(page)
    assert len(plain) == 12 and page.get_by_role("heading", name="Bought").is_visible()
    page.locator(".goods a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**seen=**")
    assert page.get_by_text("This session", exact=True).is_visible() and articles(page) != plain
    page.get_by_text("start anew").click()
    page.wait_for_url(lambda address: "seen=" not in address)
    assert articles(page) == plain


def test_a_phone_needs_no_scrolling_sideways(url, page):
    page.set_viewport_size({"width": 375, "height": 700})
    for query in ("", "?q=trousers", "?q=a-stranger"):
        page.goto(url + query)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 375


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_reports_are_whole_and_for_everybody(root, page, width, scheme):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    reports = Path(root, "reports")
    shown = [reports / "index.html", *reports.glob("*/*.html")]
    assert {path.name for path in shown} == {"index.html", "eda.html", "training.html"}
    for path in shown:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert faults(page) == [], path
        inside = page.locator("a[href^='#']").evaluate_all("all => all.map(a => a.hash.slice(1))")
        missing = [to for to in inside if page.locator(f"[id='{to}']").count() == 0]
        assert not missing, path
    assert {address.split(":")[0] for address in asked} == {"file"}


def test_the_service_page_is_for_everybody(url, page, trained_lake):
    loyal = select_example_customers(load_history(trained_lake))["loyal"]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for query in ("", f"?q={loyal}"):
            page.goto(url + query)
            assert faults(page) == [], query


def test_the_index_is_searched_from_a_folder_and_from_the_service(url, root, page):
    for address in (Path(root, "reports", "index.html").as_uri(), f"{url}reports/"):
        page.goto(address)
        whole = page.locator("[data-find]").count()
        page.get_by_role("searchbox").fill("eda succeeded")
        assert page.locator("#found").inner_text() == f"1 of {whole}"
        assert page.locator("[data-find]:visible").count() == 1
        page.get_by_role("searchbox").fill("no such thing")
        assert page.locator("[data-find]:visible").count() == 0
        version = page.locator("tr[data-find] a").first.text_content()
        page.goto(f"{address}#q={version}")
        page.reload()
        assert page.get_by_role("link", name=version, exact=True).is_visible()
        assert page.locator("[data-find]:visible").count() < whole


def test_a_promotion_is_seen_in_the_index(root, page):
    index = Path(root, "reports", "index.html")
    page.goto(index.as_uri())
    other = page.locator("tr[data-find]", has=page.locator("td.candidate")).first
    version = other.get_by_role("link").inner_text()
    command = [HM, "promote", version, "--force", "--lake", root]
    subprocess.run(command, check=True, capture_output=True)
    page.reload()
    row = page.locator("tr[data-find]", has_text=version)
    assert row.locator("td.champion").is_visible()
