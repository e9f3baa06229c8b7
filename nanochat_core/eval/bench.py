"""CORE for one model outside any run: loaded by name, answered task by task, kept in a directory."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Runtime
from nanochat_core.eval import core
from nanochat_core.eval.subject import EvaluatedModel, identity, load_subject
from nanochat_core.machine.ranks import World, pick_device, pick_dtype


class Done(NamedTuple):
    core: float
    scores: list[core.Score]
    directory: Path


def core_of(
    name: str,
    bundle: Path,
    directory: Path,
    device: str,
    limit: int | None,
    say: Callable[[str], None],
    own: bool,
) -> Done:
    """Answer the bundle's tasks with the model of that name. Answers are kept in `directory`, or with `own`
    in a folder of it that no other model, bundle or number of examples shares."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"there is no device {device!r}; it is auto, cpu or cuda")
    tasks = core.read_bundle(bundle)
    runtime = Runtime.model_validate({"device": device})
    at = pick_device(runtime)
    subject = load_subject(name, at)
    key = key_of(subject, bundle, limit)
    if own:
        directory = directory / f"{Path(name).name}-{key[:12]}"
    directory.mkdir(parents=True, exist_ok=True)
    claim(directory, key)
    world = World(0, 1, at, pick_dtype(runtime, at))
    scores = []
    found = core.answered(
        subject.model, subject.tokenizer, tasks, directory, world, limit=limit, context=subject.context
    )
    for task, outcomes in zip(tasks, found, strict=True):
        scores.append(core.summarize(task, outcomes))
        say(f"{task.label}: {scores[-1].accuracy:.4f}, centered {scores[-1].centered:.4f}")
    store.write_whole(directory / "core.csv", core.as_csv(scores))
    return Done(core.core_metric(scores), scores, directory)


def key_of(subject: EvaluatedModel, bundle: Path, limit: int | None) -> str:
    """What decides the answers, as one name."""
    parts = [subject.identity, identity(bundle), limit]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def claim(directory: Path, key: str) -> None:
    """Refuse a directory with another evaluation's answers: they would be taken for this one's."""
    path = directory / "key"
    if path.is_file() and path.read_text() != key:
        raise ValueError(
            f"{directory} has the answers of another model, bundle or number of examples; name another --out"
        )
    if not path.is_file() and any(directory.glob("*.jsonl")):
        raise ValueError(f"{directory} holds jsonl files that are not an evaluation's; name another --out")
    store.write_whole(path, key)
