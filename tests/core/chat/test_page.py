"""The page in a real browser, with a real model behind it. Wants Playwright and Chromium."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nanochat_core.tokenizer.bpe import Tokenizer, train

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One that says the script in tokens that come once each, as a parrot needs it."""
    return train(["the quick brown fox jumps over the lazy dog", *[SCRIPT] * 20], 310)


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, running) -> Iterator[Callable[..., "sync_api.Page"]]:
    """Opens the page, greedy, in a browser that has not been here before. It may not raise an error or a
    dialog."""
    trouble: list[str] = []

    def opened(**server: Any) -> "sync_api.Page":
        page = browser.new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
        page.goto(str(running(**server).base_url))
        say(page, "/temperature 0")
        return page

    yield opened
    assert trouble == []


@pytest.fixture
def page(opened, slow) -> "sync_api.Page":
    return opened()


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


def test_an_answer_can_be_stopped_and_the_question_edited(opened, parrot, tokenizer, slow) -> None:
    letters = [tokenizer.special("<|assistant_start|>"), *tokenizer.encode("QWERTYQ")]
    page = opened(of=parrot(letters))
    say(page, "what?")
    page.wait_for_selector(".turn.assistant .words:has-text('QWERTY')")
    page.click("#go")
    assert "stopped" in page.inner_text(".speed")
    length = len(page.inner_text(".turn.assistant .words"))
    page.wait_for_timeout(200)
    assert len(page.inner_text(".turn.assistant .words")) == length, "it says no more"


def test_a_question_can_be_edited_and_is_answered_anew(page) -> None:
    say(page, "what?")
    answered(page)
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


def test_a_script_in_an_answer_stays_text(opened, parrot, tokenizer) -> None:
    tokens = tokenizer.encode(SCRIPT)
    assert len(set(tokens)) == len(tokens)
    start, end = tokenizer.special("<|assistant_start|>"), tokenizer.special("<|assistant_end|>")
    page = opened(of=parrot([start, *tokens, end]))
    say(page, "what?")
    assert answered(page) == SCRIPT
    assert page.locator("#log script").count() == 0
    page.reload()
    assert page.inner_text(".turn.assistant .words") == SCRIPT


def test_all_of_it_works_by_keyboard(page) -> None:
    page.keyboard.type("what?")  # the message has the focus from the start
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("document.activeElement.id") == "text"

    def tab_to(words: str) -> None:
        for _ in range(20):
            page.keyboard.press("Shift+Tab")
            if words in page.evaluate("document.activeElement.innerText"):
                return
        raise AssertionError(f"{words} cannot be reached")

    tab_to("Regenerate")
    page.keyboard.press("Enter")
    assert answered(page).startswith("so")
    assert page.evaluate("document.activeElement.id") == "text"
    tab_to("Edit")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("why?")
    page.keyboard.press("Enter")
    answered(page)
    assert page.inner_text(".turn.user .words") == "why?"
    page.keyboard.press("Control+Shift+N")
    assert page.locator(".turn").count() == 0
    tab_to("Settings")
    page.keyboard.press("Enter")
    assert page.locator("#settings").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#settings").is_visible()


def test_what_a_screen_reader_needs_is_there(page) -> None:
    say(page, "what?")
    answered(page)
    assert page.get_by_role("log", name="Conversation").is_visible()
    assert page.get_by_role("article", name="You").is_visible()
    assert page.get_by_role("article", name="tiny").is_visible()
    assert "tiny: so" in page.get_by_role("status").first.inner_text()
    for tag in ("button", "textarea", "select"):
        for i in range((found := page.locator(f"{tag}:visible")).count()):
            named = found.nth(i).evaluate("e => e.innerText || e.ariaLabel || e.labels?.[0]?.innerText || ''")
            assert named.strip(), found.nth(i).evaluate("e => e.outerHTML")


def test_a_server_with_a_key_asks_for_it_and_says_what_is_wrong(opened) -> None:
    page = opened(token="secret")
    page.wait_for_selector("#about:has-text('needs an API key')")
    say(page, "what?")
    assert "API key" in page.inner_text(".error")
    page.click("#settings-button")
    page.fill("[name=key]", "secret")
    page.click("text=Done")
    page.wait_for_selector("#about:has-text('parameters')")
    page.click("text=Regenerate")
    assert answered(page).startswith("so")


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
