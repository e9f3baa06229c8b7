"""The chat page as it is sent: the model's name in it, and a policy that lets nothing foreign run."""

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("ui.html")


def render(name: str) -> tuple[str, str]:
    """The page for a model of that name, and the Content-Security-Policy to send with it."""
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    html = PAGE.read_text(encoding="utf-8").replace("{{model}}", escaped)

    def hashed(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert found is not None
        return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{hashed('script')}'; style-src 'sha256-{hashed('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
