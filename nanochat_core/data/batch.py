"""What the training loop eats, and a thread that prepares it ahead of time."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's part of one optimizer step. R rows, T tokens."""

    inputs: Tensor  # (R, T) token ids
    targets: Tensor  # (R, T) the tokens after them, -1 where nothing is to be learned
    weights: Tensor  # (R, T) how much each counts, before the division by `count` of all ranks
    count: float  # this rank's share of the divisor: its active tokens
    cursor: Callable[[], dict[str, Any]]  # the place in the data after this batch, as JSON
    notes: dict[str, float] = field(default_factory=dict)  # what to record beside the loss


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory."""
    return dataclasses.replace(
        batch,
        inputs=batch.inputs.pin_memory(),
        targets=batch.targets.pin_memory(),
        weights=batch.weights.pin_memory(),
    )


def ahead(batches: Iterator[Batch], *, pin: bool = False, depth: int = 2) -> Iterator[Batch]:
    """The same batches, made by a thread while the one before is being used.

    `pin` puts them in page-locked memory, from which a copy to a CUDA device does not hold the host up.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(pinned(batch) if pin else batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # it belongs to whoever reads
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
