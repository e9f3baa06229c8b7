"""The page in a real browser, with a real model behind it. Wants Playwright and Chromium."""

import shutil
from collections.abc import Iterator

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, running, slow) -> Iterator["sync_api.Page"]:
    """The page, greedy, in a browser that has not been here before. It may not raise an error or a dialog."""
    page = browser.new_page()
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    page.goto(str(running().base_url))
    say(page, "/temperature 0")
    yield page
    assert trouble == []


def say(page: "sync_api.Page", text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered(page: "sync_api.Page") -> str:
    page.wait_for_selector("#go[aria-label=Send]")
    return page.inner_text(".turn.assistant:last-of-type .words").strip()


def test_an_answer_streams_in_with_its_tool_call_and_can_be_asked_for_again(page) -> None:
    say(page, "what?")
    assert answered(page).split() == ["socalculator12*3", "=", "36", "ok"]
    assert "tokens/s" in page.inner_text(".speed")
    page.click("text=Regenerate")
    assert answered(page).startswith("so")
    assert page.locator(".turn").count() == 2


def test_an_answer_can_be_stopped_and_the_question_edited(page) -> None:
    say(page, "what?")
    page.wait_for_selector("#go[aria-label=Stop]")
    page.click("#go")
    assert "stopped" in page.inner_text(".speed") or answered(page)
    page.click(".turn.user button:has-text('Edit')")
    page.fill(".editor textarea", "why?")
    page.press(".editor textarea", "Enter")
    assert answered(page).endswith("ok")
    assert page.inner_text(".turn.user .words") == "why?" and page.locator(".turn").count() == 2


def test_conversations_stay_in_the_browser_and_can_be_left_and_deleted(page) -> None:
    say(page, "first")
    answered(page)
    page.click("#new")
    say(page, "second")
    answered(page)
    page.reload()
    assert page.locator("#talks li").count() == 2
    page.click("#talks .open:has-text('first')")
    assert page.inner_text(".turn.user .words") == "first"
    page.click("[aria-label='Delete: first']")
    assert page.locator("#talks li").count() == 1 and page.locator(".turn").count() == 0


def test_markup_in_a_message_stays_text(page) -> None:
    say(page, EVIL)
    answered(page)
    assert page.inner_text(".turn.user .words") == EVIL
    shown = page.evaluate(
        """text => { const box = document.createElement("div"); box.append(...markdown(text));
           const count = (what) => box.querySelectorAll(what).length;
           return [box.textContent, count("script, img"), count("a")] }""",
        EVIL + "\n\n[x](javascript:alert(3)) **" + EVIL + "**",
    )
    assert shown[0].count(EVIL) == 2 and shown[1:] == [0, 0]


def test_the_page_has_dark_colours_and_fits_a_phone(page) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(colour)
    page.emulate_media(color_scheme="light")
    assert page.evaluate(colour) != dark
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.click("#menu")
    page.click("#new")
    say(page, "x" * 200)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
