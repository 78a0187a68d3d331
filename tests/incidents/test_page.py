"""The page, in a headless Chromium, against a real server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.server.conftest import Proxy
from tests.server.fake_engine import FakeEngine, Script
from tests.server.hosting import Host
from tests.server.test_server_answers import CHAT, chat_body

from .test_incidents_served import TOKEN, listed, served

ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        # Without one on this machine, playwright's own: `playwright install --only-shell chromium`.
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])


@pytest.fixture
def proxy(engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path) -> Iterator[Proxy]:
    """With 3 incidents, the last of which has markup wherever a client can put text."""
    with served(played[1].url, tmp_path, policy={"content": "full"}) as found:
        engine.script = Script(flagged=True)
        found.post(CHAT, chat_body())
        engine.script = Script(blocked={0: 3})
        found.post(CHAT, chat_body(model="other"))
        engine.script = Script(blocked={0: 0})
        messages = [{"role": "user", "content": ATTACK}]
        found.post(CHAT, chat_body(model=ATTACK[:100], messages=messages))
        listed(found, 3)
        yield found


@pytest.fixture
def page(browser: Browser, proxy: Proxy) -> Iterator[Page]:
    context = browser.new_context(base_url=proxy.host.admin_url)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto("/")
    expect(page.locator("#rows tr")).to_have_count(3)
    yield page
    context.close()
    assert problems == []


def test_incidents_are_listed_newest_first_and_filtered(page: Page) -> None:
    actions = page.locator("#rows tr td:nth-child(2)")
    expect(actions).to_have_text(["block", "block", "flag"])
    page.get_by_label("Action").select_option("flag")
    page.get_by_role("button", name="Filter").click()
    expect(actions).to_have_text(["flag"])
    assert "action=flag" in page.url
    page.reload()
    expect(actions).to_have_text(["flag"])
    page.get_by_role("button", name="Clear").click()
    expect(actions).to_have_count(3)
    page.get_by_label("Model").fill("nothing")
    page.keyboard.press("Enter")
    expect(page.get_by_text("No incident fits.")).to_be_visible()


def test_an_incident_shows_its_scores_over_tokens_and_its_text(page: Page) -> None:
    page.locator("#rows tr").nth(1).click()
    expect(page.locator("#title")).to_contain_text("block")
    expect(page.locator("#chart svg")).to_have_count(1)
    expect(page.locator("#chart circle").first).to_be_visible()
    expect(page.locator("#chart .threshold")).to_have_count(1)
    # Of the trace's three tokens one has no score; the detector that has no trace is not drawn as a line.
    expect(page.locator("#chart polyline")).to_have_count(1)
    assert len((page.locator("#chart polyline").get_attribute("points") or "").split()) == 2
    expect(page.locator("#chart circle.over").first).to_be_visible()
    expect(page.locator("#content")).to_contain_text("What is six times seven?")
    page.keyboard.press("Escape")
    expect(page.locator("#rows tr")).to_have_count(3)


def test_what_a_client_wrote_is_text_and_nothing_else(page: Page) -> None:
    page.locator("#rows tr").first.click()
    expect(page.locator("#content pre")).to_have_text(ATTACK)
    expect(page.locator("#facts")).to_contain_text(ATTACK[:100])
    assert page.locator("#content img, #facts img, #rows img, main script").count() == 0
    assert page.title() != "owned"


def test_labels_are_given_by_key_and_by_click(page: Page, proxy: Proxy) -> None:
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.keyboard.press("f")
    expect(page.locator("#status")).to_have_text("Say who you are first.")
    page.get_by_label("Reviewer").fill("ada")
    page.get_by_label("Note").fill("a customer's own")
    page.get_by_role("button", name="False alarm").click()
    expect(page.locator("#history")).to_contain_text("false, ada")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("t")
    expect(page.locator("#rows tr td:nth-child(7)")).to_have_text(["false", "true", ""])
    assert [row["label"] for row in listed(proxy, 3)] == ["false", "true", None]
    page.reload()
    page.locator("#rows tr").first.click()
    expect(page.get_by_label("Reviewer")).to_have_value("ada")


def test_an_address_with_an_incident_opens_it(page: Page, proxy: Proxy) -> None:
    oldest = listed(proxy, 3)[2]
    page.goto(f"/#{oldest['id']}")
    page.reload()
    expect(page.locator("#facts")).to_contain_text(oldest["id"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, proxy: Proxy, scheme: str) -> None:
    context = browser.new_context(
        base_url=proxy.host.admin_url,
        viewport={"width": 360, "height": 740},
        color_scheme=scheme,  # type: ignore[arg-type]
    )
    page = context.new_page()
    page.goto("/")
    expect(page.locator("#rows tr")).to_have_count(3)
    page.locator("#rows tr").first.click()
    expect(page.locator("#chart svg")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    contrast = """() => {
      const light = (colour) => { const [r, g, b] = colour.match(/[0-9.]+/g).map((each) => { const c = each / 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const style = getComputedStyle(document.body);
      const [one, two] = [light(style.color), light(style.backgroundColor)];
      return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    }"""  # noqa: E501
    assert page.evaluate(contrast) > 7
    context.close()


def test_a_browser_signs_in_with_the_token_as_its_password(
    browser: Browser, engine: FakeEngine, played: tuple[FakeEngine, Host], tmp_path: Path
) -> None:
    with served(played[1].url, tmp_path, {"UNDERTOW_OPERATOR_TOKEN": TOKEN}) as proxy:
        engine.script = Script(flagged=True)
        proxy.post(CHAT, chat_body())
        context = browser.new_context(
            base_url=proxy.host.admin_url, http_credentials={"username": "ada", "password": TOKEN}
        )
        page = context.new_page()
        page.goto("/")
        expect(page.locator("#rows tr")).to_have_count(1)
        context.close()
