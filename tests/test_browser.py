"""The service's page in a real browser, as a person with a keyboard and one with a phone see it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from hm_reco.model.history import load_history
from hm_reco.stages.inference import portraits
from tests.conftest import free_port, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def url(trained_lake):
    command = [str(Path(sys.executable).with_name("hm")), "serve", "--lake", trained_lake.root]
    port = free_port()
    with subprocess.Popen(
        command, env=os.environ | {"HM_PORT": str(port)}, stderr=subprocess.DEVNULL
    ) as it:
        wait_for(f"http://127.0.0.1:{port}/readyz")
        yield f"http://127.0.0.1:{port}/"
        it.terminate()


@pytest.fixture
def page():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        yield page
        assert problems == []
        browser.close()


def articles(page: Page) -> list[str]:
    return page.locator("section.ranked .goods a").evaluate_all("all => all.map(a => a.title)")


def test_by_keyboard_from_a_search_to_a_session(url, page, trained_lake):
    loyal = portraits(load_history(trained_lake))["loyal"]
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
