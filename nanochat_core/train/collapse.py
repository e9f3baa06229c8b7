"""Whether reinforcement learning has begun to destroy what it set out from, and the best model kept until
then."""

import json
import math
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat_core.artifacts import store
from nanochat_core.data.batch import Batch
from nanochat_core.model.gpt import GPT
from nanochat_core.train.checkpoint import TrainState, write_tensors
from nanochat_core.train.rollouts import Vitals

SIGMAS = 3.0  # standard errors by which a reward has to have fallen for the fall to be believed


class Collapsed(Exception):
    """The monitor has seen enough; its words say what."""


@dataclass(frozen=True)
class CollapseLimits:
    """How far the mean of the last `window` steps may go, and the held-out reward of an examination."""

    window: int
    questions: int  # a step: what the reward's noise depends on
    problems: int  # an examination
    reward_drop: float  # share of the best that may be lost
    entropy_low: float  # of the entropy at the start
    entropy_high: float
    length_low: float  # of the length at the start
    unfinished_rise: float  # over the share of unfinished answers at the start

    def fell(self, best: float, now: float, questions: int) -> bool:
        """Whether a reward has fallen too far, and by more than its noise. A sure policy answers a question
        always right or always wrong, so questions are what is counted."""
        noise = math.sqrt(best * max(0.0, 1 - best) / questions)
        return best - now > max(self.reward_drop * best, SIGMAS * noise)


class Monitor:
    """Looks at every step's answers and every examination, and says when to stop. What it knows is plain data
    and goes into the checkpoint, so that a resumed run stops where the other would have."""

    def __init__(self, limits: CollapseLimits, start: Vitals) -> None:
        self.limits = limits
        self.start = start  # the examination at step 0
        self.best = self.best_examined = start.reward
        self.recent: deque[Vitals] = deque(maxlen=limits.window)
        self.why: str | None = None

    def state(self) -> dict[str, Any]:
        return {
            "start": list(self.start),
            "best": self.best,
            "best_examined": self.best_examined,
            "recent": [list(vitals) for vitals in self.recent],
            "why": self.why,
        }

    @classmethod
    def restored(cls, limits: CollapseLimits, state: dict[str, Any]) -> "Monitor":
        monitor = cls(limits, Vitals(*state["start"]))
        monitor.best, monitor.best_examined = state["best"], state["best_examined"]
        monitor.recent.extend(Vitals(*vitals) for vitals in state["recent"])
        monitor.why = state["why"]
        return monitor

    def examined(self, reward: float) -> None:
        """Take in the reward on held-out problems, which falls where the training reward is cheated."""
        if self.limits.fell(self.best_examined, reward, self.limits.problems):
            self.why = f"the reward on held-out problems fell from {self.best_examined:.3f} to {reward:.3f}"
        self.best_examined = max(self.best_examined, reward)

    def see(self, vitals: Vitals) -> str | None:
        """Take a step in; why to stop, if it is time to. Of steps nothing is said before a whole window."""
        self.recent.append(vitals)
        n = len(self.recent)
        if self.why is None and n == self.limits.window:
            now = Vitals(*(sum(column) / n for column in zip(*self.recent, strict=True)))
            self.best = max(self.best, now.reward)
            self.why = self._verdict(now)
        return self.why

    def _verdict(self, now: Vitals) -> str | None:
        limits, start, last = self.limits, self.start, f"over the last {self.limits.window} steps"
        if limits.fell(self.best, now.reward, limits.questions * limits.window):
            return f"the reward fell from {self.best:.3f} to {now.reward:.3f} {last}"
        if now.reward <= start.reward:  # sure and right is the aim
            floor = limits.entropy_low * start.entropy
            if now.entropy < floor:
                return (
                    f"the entropy fell from {start.entropy:.3f} to {now.entropy:.3f} nats a token {last}, "
                    f"and the reward did not rise"
                )
        if now.entropy > limits.entropy_high * start.entropy:
            return f"the entropy rose from {start.entropy:.3f} to {now.entropy:.3f} nats a token {last}"
        if now.length < limits.length_low * start.length:
            return f"answers shrank from {start.length:.1f} to {now.length:.1f} tokens {last}"
        if now.unfinished > start.unfinished + limits.unfinished_rise:
            return f"answers that never end went from {start.unfinished:.0%} to {now.unfinished:.0%} {last}"
        return None


class Kept(NamedTuple):
    step: int
    reward: float


class Best:
    """The model that did best when it was examined, beside the checkpoints until the stage is done."""

    def __init__(self, job_path: Path) -> None:
        self.directory = job_path / "checkpoints" / "best"

    def kept(self) -> Kept | None:
        path = self.directory / "best.json"
        if not path.exists():
            return None
        known = json.loads(path.read_text())
        return Kept(known["step"], known["reward"])

    def offer(self, model: GPT, step: int, reward: float) -> None:
        """Keep this one, if it is the first or better than the one before it."""
        kept = self.kept()
        # A kept one of a later step is of a future that a damaged checkpoint sent us back from.
        if kept is not None and kept.step <= step and kept.reward >= reward:
            return
        part = self.directory.with_name("best.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_tensors(
            part / "model.safetensors", {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        )
        weights = store.entry(part / "model.safetensors")
        store.write_json(part / "best.json", {"step": step, "reward": reward, "weights": weights})
        shutil.rmtree(self.directory, ignore_errors=True)
        part.replace(self.directory)
        store.sync_directory(self.directory.parent)

    @torch.no_grad()
    def restore(self, model: GPT) -> Kept:
        """Bring the model back to what was kept."""
        from safetensors.torch import load_file

        kept, path = self.kept(), self.directory / "model.safetensors"
        known = json.loads((self.directory / "best.json").read_text()) if kept else {}
        if kept is None or store.entry(path) != known["weights"]:
            raise ValueError(f"the best model in {self.directory} is damaged; make it again with --rerun rl")
        weights = load_file(path)
        for name, tensor in model.state_dict().items():
            tensor.copy_(weights[name])
        return kept


class EarlyStopping:
    """Ends a run with Collapsed if its evaluations or rollouts say so. Its state is part of the cursor."""

    def __init__(self, limits: CollapseLimits, job_path: Path) -> None:
        self.limits, self.best = limits, Best(job_path)
        self.monitor: Monitor | None = None  # made by the evaluation at step 0, or restored from a checkpoint

    def resume(self, state: TrainState) -> dict[str, Any]:
        """The cursor of the rollouts to go on with."""
        state.cursor = state.cursor.get("ranks", [state.cursor])[0]  # the same on every rank
        known = state.cursor.get("monitor")
        self.monitor = None if known is None else Monitor.restored(self.limits, known)
        return state.cursor

    def evaluated(self, step: int, vitals: Vitals) -> None:
        if self.monitor is None or step == 0:
            self.monitor = Monitor(self.limits, vitals)
        else:
            self.monitor.examined(vitals.reward)

    def monitored(self, rollouts: Iterator[tuple[Batch, Vitals]]) -> Iterator[Batch]:
        """The batches, each seen by the monitor first."""
        for batch, vitals in rollouts:
            assert self.monitor is not None  # hooks come before the first batch
            self.monitor.see(vitals)
            self.check()
            cursor = partial(dict[str, Any], batch.cursor(), monitor=self.monitor.state())
            yield replace(batch, cursor=cursor, notes=batch.notes | vitals._asdict())

    def check(self) -> None:
        if self.monitor is not None and self.monitor.why is not None:
            raise Collapsed(self.monitor.why)
