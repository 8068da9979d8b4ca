"""The pages in a real browser: by keyboard, on a phone, with an accessibility check."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page

from hm_reco.data.history import load_history
from hm_reco.stages.inference import select_example_customers
from tests.conftest import find_accessibility_violations, find_free_port, wait_for_url

HM = str(Path(sys.executable).with_name("hm"))
QUICK = ("evaluation_weeks=2", "training_weeks=2", "tower_examples=0", "rounds=30")


@pytest.fixture(scope="module")
def lake_root(trained_lake, tmp_path_factory) -> str:
    """A lake with a data report and two trained models."""
    lake = str(tmp_path_factory.mktemp("read") / "lake")
    shutil.copytree(trained_lake.root, lake)
    options = [option for assignment in QUICK for option in ("-p", f"training.{assignment}")]
    for args in (["eda", "training"], ["training", "-p", "seed=1"]):
        subprocess.run(
            [HM, "run", *args, "--lake", lake, *options], check=True, capture_output=True
        )
    return lake


@pytest.fixture(scope="module")
def url(lake_root):
    command = [HM, "serve", "--lake", lake_root]
    port = find_free_port()
    with subprocess.Popen(
        command, env=os.environ | {"HM_PORT": str(port)}, stderr=subprocess.DEVNULL
    ) as process:
        wait_for_url(f"http://127.0.0.1:{port}/readyz")
        yield f"http://127.0.0.1:{port}/"
        process.terminate()


def list_article_titles(page: Page) -> list[str]:
    return page.locator("section.ranked .goods a").evaluate_all("all => all.map(a => a.title)")


def test_page_by_keyboard_opens_session(url, page, trained_lake):
    loyal = select_example_customers(load_history(trained_lake))["loyal"]
    page.goto(url)
    page.keyboard.type(loyal)  # the search has the focus
    page.keyboard.press("Enter")
    page.wait_for_url("**q=**")
    titles = list_article_titles(page)
    assert len(titles) == 12 and page.get_by_role("heading", name="Bought").is_visible()
    page.locator(".goods a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**seen=**")
    assert (
        page.get_by_text("This session", exact=True).is_visible()
        and list_article_titles(page) != titles
    )
    page.get_by_text("new session").click()
    page.wait_for_url(lambda address: "seen=" not in address)
    assert list_article_titles(page) == titles


def test_page_on_phone_fits_width(url, page):
    page.set_viewport_size({"width": 375, "height": 700})
    for query in ("", "?q=trousers", "?q=unknown-customer"):
        page.goto(url + query)
        page_width = page.evaluate("document.documentElement.scrollWidth")
        assert page_width <= 375


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_reports_fit_width_and_are_accessible(lake_root, page, width, scheme):
    requested_urls: list[str] = []
    page.on("request", lambda request: requested_urls.append(request.url))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    reports = Path(lake_root, "reports")
    paths = [reports / "index.html", *reports.glob("*/*.html")]
    assert {path.name for path in paths} == {"index.html", "eda.html", "training.html"}
    for path in paths:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert find_accessibility_violations(page) == [], path
        anchors = page.locator("a[href^='#']").evaluate_all("all => all.map(a => a.hash.slice(1))")
        missing = [anchor for anchor in anchors if page.locator(f"[id='{anchor}']").count() == 0]
        assert not missing, path
    assert {address.split(":")[0] for address in requested_urls} == {"file"}


def test_service_page_is_accessible(url, page, trained_lake):
    loyal = select_example_customers(load_history(trained_lake))["loyal"]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for query in ("", f"?q={loyal}"):
            page.goto(url + query)
            assert find_accessibility_violations(page) == [], query


def test_report_index_search_from_file_and_service(url, lake_root, page):
    for address in (Path(lake_root, "reports", "index.html").as_uri(), f"{url}reports/"):
        page.goto(address)
        n_rows = page.locator("[data-find]").count()
        page.get_by_role("searchbox").fill("eda succeeded")
        assert page.locator("#found").inner_text() == f"1 of {n_rows}"
        assert page.locator("[data-find]:visible").count() == 1
        page.get_by_role("searchbox").fill("no such thing")
        assert page.locator("[data-find]:visible").count() == 0
        version = page.locator("tr[data-find] a").first.text_content()
        page.goto(f"{address}#q={version}")
        page.reload()
        assert page.get_by_role("link", name=version, exact=True).is_visible()
        assert page.locator("[data-find]:visible").count() < n_rows


def test_report_index_shows_promotion_after_reload(lake_root, page):
    index = Path(lake_root, "reports", "index.html")
    page.goto(index.as_uri())
    candidate_row = page.locator("tr[data-find]", has=page.locator("td.candidate")).first
    version = candidate_row.get_by_role("link").inner_text()
    command = [HM, "promote", version, "--force", "--lake", lake_root]
    subprocess.run(command, check=True, capture_output=True)
    page.reload()
    row = page.locator("tr[data-find]", has_text=version)
    assert row.locator("td.champion").is_visible()
