"""Takes the pictures of the chat page in docs/chat/: each state of the real page, talking to a real model.

    uv run python docs/pictures.py MODEL_DIRECTORY [--out docs/chat]

MODEL_DIRECTORY is a trained stage's or an exported model's. Wants Chromium; nothing leaves this machine.
"""

import argparse
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from browser import chromium
from playwright.sync_api import Browser, Page

from nanochat_core.chat.web import about, create_app
from nanochat_core.infer.engine import Engine
from nanochat_core.infer.load import load_chat

MARKDOWN = """\
Sorting is **easy** in Python:

```python
def largest_first(numbers: list[int]) -> list[int]:
    return sorted(numbers, reverse=True)
```

1. `sorted` makes a new list,
2. `list.sort` changes the one you have.

| call | new list | returns |
|---|---|---|
| `sorted(x)` | yes | the list |
| `x.sort()` | no | `None` |

> And <script>alert("this stays text")</script>."""
KEPT = {
    "talks": [
        {
            "id": "a",
            "title": "How do I sort a list?",
            "turns": [
                {"role": "user", "content": "How do I sort a list?"},
                {"role": "assistant", "content": MARKDOWN},
            ],
        },
        {"id": "b", "title": "Tom has 17 apples", "turns": []},
    ],
    "current": "a",
    "settings": {},
}


@contextlib.contextmanager
def served(directory: Path) -> Iterator[tuple[str, Engine]]:
    model, tokenizer = load_chat(directory)
    engine = Engine(model, tokenizer, max_rows=2, context=model.config.sequence_len)
    app = create_app(engine, "sft", facts=about(model))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
        server.should_exit = True
        thread.join()


def say(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered(page: Page) -> None:
    page.wait_for_selector("#go[aria-label=Send]")


class Pictures:
    """A browser that has not been here before for each set, and pictures under their names."""

    def __init__(self, browser: Browser, url: str, out: Path) -> None:
        self._browser, self._url, self._out = browser, url, out

    def page(self, width: int = 1000, height: int = 700, dark: bool = False, kept: bool = False) -> Page:
        page = self._browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        if kept:
            page.add_init_script(f"localStorage.nanochat ??= {json.dumps(json.dumps(KEPT))}")
        page.goto(self._url)
        page.wait_for_selector("#about:has-text('parameters')")
        return page

    def take(self, page: Page, name: str) -> None:
        page.screenshot(path=self._out / f"{name}.png")
        print(self._out / f"{name}.png")


def all_states(pictures: Pictures, engine: Engine) -> None:
    page = pictures.page()
    pictures.take(page, "empty")
    step = engine.step

    def slowly() -> None:
        time.sleep(0.15)
        step()

    engine.step = slowly  # type: ignore[method-assign]  # so that the picture of streaming is one
    say(page, "What is the capital of France?")
    page.wait_for_selector(".turn.assistant .words:not(:empty)")
    pictures.take(page, "streaming")
    page.keyboard.press("Escape")
    page.wait_for_selector(".speed:has-text('stopped')")
    pictures.take(page, "stopped")
    engine.step = step  # type: ignore[method-assign]
    page.click("text=Regenerate")
    answered(page)
    say(page, "Tom has 17 apples and buys 25 more. How many has he?")
    answered(page)
    pictures.take(page, "answered")
    page.click(".turn.user >> nth=1 >> text=Edit")
    pictures.take(page, "editing")
    page.keyboard.press("Escape")
    say(page, "/help")
    pictures.take(page, "commands")
    page.click("#settings-button")
    pictures.take(page, "settings")
    page.keyboard.press("Escape")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.click("#new")
    say(page, "Are you there?")
    answered(page)
    pictures.take(page, "error")
    for dark in (False, True):
        pictures.take(pictures.page(dark=dark, kept=True), "markdown-dark" if dark else "markdown")
    phone = pictures.page(width=390, height=760, kept=True)
    pictures.take(phone, "phone")
    phone.click("#menu")
    phone.wait_for_timeout(400)
    pictures.take(phone, "phone-menu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "chat")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with served(options.model) as (url, engine), chromium(parser) as browser:
        all_states(Pictures(browser, url, options.out), engine)


if __name__ == "__main__":
    main()
