"""How long the network is waited for: by the time that brought nothing, not by the number of tries."""

import random
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from nanochat_core.sources.http import RetryableError

Wait = Callable[[float], object]
Tell = Callable[[str], object]  # what is being waited for
T = TypeVar("T")

PATIENCE = 45 * 60.0  # a router that restarts, a provider's night work; Runtime.network_minutes sets it
LONGEST_PAUSE = 60.0  # of our own; a server may ask for more
SHORTEST_PAUSE = 1.0  # whatever a server asks for


class Patience:
    """The pauses between tries at one address, until `seconds` in a row have brought nothing."""

    def __init__(self, url: str, seconds: float, wait: Wait, tell: Tell) -> None:
        self.host, self.seconds, self.wait, self.tell = urlsplit(url).netloc, seconds, wait, tell
        self.jitter = random.Random(url)
        self.renew()

    def renew(self) -> None:
        """Something has come: all the time is there again."""
        self.failures, self.idle, self.since = 0, 0.0, time.monotonic()

    def pause(self, why: RetryableError) -> bool:
        """Wait before the next try; False if the time is up."""
        self.idle += time.monotonic() - self.since
        left = self.seconds - self.idle
        if left <= 0:
            return False
        self.failures += 1
        own = min(LONGEST_PAUSE, 2.0 ** min(self.failures, 10)) * self.jitter.uniform(0.5, 1.0)
        seconds = min(left, own if why.after is None else max(SHORTEST_PAUSE, why.after))
        self.tell(
            f"waiting for the network: {self.host}, {why}; next try in {seconds:.0f} s, "
            f"given up in {left / 60:.0f} min"
        )
        self.wait(seconds)
        self.idle += seconds  # as meant, so that a test need not wait
        self.since = time.monotonic()
        return True


def insistently(ask: Callable[[], T], patience: Patience, otherwise: str = "") -> T:
    """The answer to a question, asked again for as long as there is patience; `otherwise` is what else the
    user can do."""
    while True:
        try:
            return ask()
        except RetryableError as why:
            if not patience.pause(why):
                raise ValueError(
                    f"{patience.host} gave no answer in {patience.seconds / 60:.0f} min: {why}; "
                    f"the same command tries again{otherwise and f', or {otherwise}'}"
                ) from None
