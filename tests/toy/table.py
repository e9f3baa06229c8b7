"""A table with the real names, as small as can be: plans, launches, flows and commands are tested with it.

Each stage takes milliseconds, can be slowed down and made to fail; it trains by arithmetic that a kill must
not disturb.
"""

import hashlib
import json
import signal
import time
from types import FrameType, SimpleNamespace
from typing import Any

from nanochat_core.artifacts.planned import Planned
from nanochat_core.artifacts.stage import Interrupted, Job, Metrics, Recipe, Stage
from nanochat_core.artifacts.store import entry, write_whole


class Text(Recipe):
    words: int = 50


class Training(Recipe):
    steps: int = 5
    depth: int = 2
    pause: float = 0.0  # seconds of each step
    fail_at: int | None = None
    lr: float = 0.02

    def facts(self, stage: Planned) -> dict[str, float]:
        if self.depth > 99:
            raise ValueError(f"pretrain.depth {self.depth} does not fit; set it to at most 99")
        return {
            "steps": self.steps,
            "params": 100 * self.depth,
            "tokens": 10 * self.steps,
            "flops": 1e6 * self.steps,
        }


class Measuring(Recipe):
    questions: int = 10


def write_text(cfg: Text, job: Job[Text]) -> Metrics:
    shared = job.runtime.base_dir / "downloads" / "words.txt"
    shared.parent.mkdir(parents=True, exist_ok=True)
    write_whole(shared, "\n".join(f"word{i}" for i in range(cfg.words)))
    job.uses(shared)
    write_whole(job.path / "shards.json", f'["words.txt", {cfg.words}]')
    return {"documents": cfg.words}


def train(cfg: Training, job: Job[Training]) -> Metrics:
    """A state that is the hash of its past, saved at each step, as a real training stage does."""
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    saved = sorted((job.path / "checkpoints").glob("step_????????"))
    step, state = 0, "".join(str(path.name) for path in sorted(job.inputs.values())) + str(cfg.depth)
    if saved:
        step, state = int(saved[-1].name.removeprefix("step_")), (saved[-1] / "state").read_text()
    notes = job.runtime.base_dir / "starts"  # for the tests; no part of the artefact
    notes.mkdir(exist_ok=True)
    with (notes / f"{job.stage}-{job.fingerprint}").open("a") as f:
        f.write(f"{step}\n")
    while step < cfg.steps:
        if step == cfg.fail_at:
            raise ValueError(f"the loss is not finite at step {step}")
        if stopping:
            raise Interrupted(job.stage)
        time.sleep(cfg.pause)
        state = hashlib.sha256(state.encode()).hexdigest()
        step += 1
        folder = job.path / "checkpoints" / "half"
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "state", state)
        write_whole(folder / "manifest.json", json.dumps({"files": {"state": entry(folder / "state")}}))
        folder.rename(folder.with_name(f"step_{step:08d}"))
        rates: dict[str, float] = {"lr": 0.02 * (1 - step / cfg.steps), "tokens_per_s": 1000.0 + step}
        job.record(step=step, steps=cfg.steps, loss=5 - 3 * step / cfg.steps, **rates)
    write_whole(job.path / "model.safetensors", state)
    return {"val_bpb_start": 3.2, "val_bpb": 1.5, "params": 100 * cfg.depth, "tokens_per_s": 1010.0}


def measure(cfg: Measuring, job: Job[Measuring]) -> Metrics:
    model = (job.inputs["model"] / "model.safetensors").read_text()
    write_whole(job.path / "answers.txt", model[:8] * cfg.questions)
    return {"chatcore": 0.5, "spelling": 0.75, "arithmetic": 0.25}


def losses(cfg: Measuring, job: Job[Measuring]) -> Metrics:
    return {"train_bpb": 1.4, "val_bpb": 1.5}


def tell(cfg: Measuring, job: Job[Measuring]) -> Metrics:
    write_whole(job.path / "report.md", "# report\n" + "\n".join(f"- {name}" for name in job.inputs))
    return {"sft/chatcore": 0.5}


def row(name: str, config: type[Recipe], run: Any, reads: dict[str, str], **more: Any) -> Stage:
    return Stage(name, SimpleNamespace(Config=config, run=run), reads=reads, **more)


STAGES = (
    row("shards", Text, write_text, {}),
    row(
        "pretrain",
        Training,
        train,
        {"text": "shards"},
        device=True,
        trains="base",
        shows=("params", "val_bpb_start", "val_bpb"),
    ),
    row(
        "base_loss",
        Measuring,
        losses,
        {"model": "pretrain", "text": "shards"},
        measures="base",
        shows=("val_bpb",),
    ),
    row("mid", Training, train, {"model": "pretrain"}, device=True, trains="mid"),
    row("sft", Training, train, {"model": "mid"}, device=True, trains="sft"),
    row("sft_eval", Measuring, measure, {"model": "sft"}, measures="sft"),
    row("draft_eval", Measuring, measure, {"model": "mid"}, measures="mid", optional=True),
    row("report", Measuring, tell, {}, gathers="all", reports=True),
)
