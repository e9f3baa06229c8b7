"""How long, how much disk and how much memory: what can be said of a plan before anything runs."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.artifacts.planned import Estimate, Speed
from nanochat_core.artifacts.progress import count
from nanochat_core.artifacts.stage import Recipe
from nanochat_core.runner.calibrate import BYTES_PER_PARAM, Calibration, assumed, assumed_rate, kept
from nanochat_core.runner.plan import Plan, Verdict, latest_run

START_SECONDS = 5.0  # a process, torch and the data, before the first step
HOW = ("device", "precision", "compile", "threads", "nproc", "nnodes")  # of a runtime: what sets the speed
OVERHEAD = 2e9  # logs, Prefect's database, torch's compile cache


class Forecast(NamedTuple):
    """What one stage would take. None is "not known", never zero."""

    seconds: float | None
    disk: int | None  # bytes, at the stage's fullest
    facts: Mapping[str, float]
    about: bool = False  # the seconds rest on assumed amounts of work


class Need(NamedTuple):
    """What a plan still asks of the machine, in bytes."""

    disk: int  # to be written yet, at the fullest
    memory: int  # at least: weights, gradients and moments


def forecast(plan: Plan, verdicts: Mapping[str, Verdict]) -> tuple[dict[str, Forecast], str]:
    """Each row's share, from its last artefact, a calibration or its FLOPs; and the rate reckoned with."""
    results = earlier(plan)
    base = plan.base
    same_model = base is None or results.get(base, {}).get("fingerprint") == plan.jobs[base].fingerprint
    measured = kept(plan)
    rate, source = flops_rate(plan, results)
    speed = measured or assumed(plan, rate)
    found = {}
    for name, verdict in verdicts.items():
        facts, old = plan.facts(name), results.get(name)
        seconds: float | None = None
        about = False
        if verdict.state == "fetch":
            seconds = 0.0  # of work; what copying takes is the network's affair
        elif verdict.state != "hit":
            if old is not None and (factor := growth(plan, name, old, same_model)) is not None:
                seconds = old["seconds"] * factor
            elif speed is not None:
                if (work := by_calibration(plan, name, speed)) is not None:
                    seconds, about = START_SECONDS + work.seconds, work.about
            elif facts.get("flops"):
                seconds = START_SECONDS + facts["flops"] / rate
            if seconds is not None and verdict.step is not None and facts.get("steps"):
                seconds *= max(0.0, 1 - verdict.step / facts["steps"])
        disk, scratch = sizes(plan, name, verdict, old)
        found[name] = Forecast(seconds, None if disk is None else disk + scratch, facts, about)
    if measured is not None:
        best = measured.best(plan.runtime.device_batch.get(base or "", 0))
        words = f"{best.tokens_per_s:,.0f} tokens/s at {best.rows} rows ({measured.how})"
        return found, words + (
            f", times {plan.runtime.processes} processes" if plan.runtime.processes > 1 else ""
        )
    return found, f"{count(rate)}FLOP/s, {source}"


def earlier(plan: Plan) -> dict[str, dict[str, Any]]:
    """The results of this profile's latest run, as far as they were made as the plan would make them: another
    device, or more processes, take another time."""
    found = {}
    for name, fingerprint in (latest_run(plan.runtime.base_dir, plan.profile) or {}).items():
        directory = plan.runtime.base_dir / name / fingerprint
        result, job = _result(directory), _job(directory)
        if result and job and all(job["runtime"].get(key) == getattr(plan.runtime, key) for key in HOW):
            found[name] = result | {"config": job["config"], "fingerprint": fingerprint}
    return found


def by_calibration(plan: Plan, name: str, measured: Calibration) -> Estimate | None:
    """A stage's work at this machine's measured speed, as its recipe reckons it."""
    best, ranks = measured.best(plan.runtime.device_batch.get(name, 0)), plan.processes(name)
    speed = Speed(
        best.tokens_per_s * ranks,
        measured.forward_tokens_per_s * ranks,
        measured.decode_tokens_per_s * ranks,
        measured.update_seconds,
    )
    recipe: Recipe = plan.jobs[name].config
    return recipe.estimate(plan.planned(name), speed)


def sizes(plan: Plan, name: str, verdict: Verdict, old: Mapping[str, Any] | None) -> tuple[int | None, int]:
    """Bytes of a stage's artefact with what it downloads, and of its checkpoints while it is at work."""
    facts = plan.facts(name)
    done = _result(plan.jobs[name].path) if verdict.state == "hit" else old
    disk: int | None = None
    if done is not None:
        disk = sum(want["size"] for want in done["files"].values())
    elif facts.get("params") or _trains(plan, name):
        disk = round(4 * _params(plan))
    if verdict.state != "hit" and facts.get("download"):
        disk = (disk or 0) + round(facts["download"])
    if not works(verdict) or not _trains(plan, name):
        return disk, 0
    # weights and two moments in fp32 for each checkpoint kept, and the one that is being written
    checkpoints = plan.runtime.keep_checkpoints + 1 + 2 * plan.runtime.audit_stretches
    return disk, round(12 * _params(plan) * checkpoints)


def needs(plan: Plan, verdicts: Mapping[str, Verdict]) -> Need:
    """What the rest of a plan wants of disk and memory; checkpoints go when their stage is done, so only the
    largest heap of them counts, without what lies there already."""
    todo = {
        name: sizes(plan, name, verdict, None) for name, verdict in verdicts.items() if verdict.state != "hit"
    }
    disk = sum(size or 0 for size, _ in todo.values()) + max(
        (scratch for _, scratch in todo.values()), default=0
    )
    disk = max(0, disk - sum(_written(plan.jobs[name].path / "checkpoints") for name in todo))
    training = any(_trains(plan, name) and works(verdicts[name]) for name in todo)
    return Need(
        round(disk + (OVERHEAD if training else 0)), round(BYTES_PER_PARAM * _params(plan)) if training else 0
    )


def works(verdict: Verdict) -> bool:
    """Whether a stage is to be made here: neither found finished nor brought from the mirror."""
    return verdict.state not in ("hit", "fetch")


def _trains(plan: Plan, name: str) -> bool:
    return bool(plan.table[name].trains)


def _params(plan: Plan) -> float:
    return 0.0 if plan.base is None else plan.facts(plan.base).get("params", 0.0)


def growth(plan: Plan, name: str, old: Mapping[str, Any], same_model: bool) -> float | None:
    """How much more work a stage is than it was, by the finest measure that both are known by; None if that
    is not to be told, as for an evaluation of another model."""
    facts, before = plan.facts(name), old["metrics"]
    if facts.get("flops") and before.get("flops"):
        return facts["flops"] / float(before["flops"])
    if not same_model and (plan.table[name].measures or _trains(plan, name)):
        return None
    for key in ("tokens", "steps"):
        if facts.get(key) and before.get(key):
            return facts[key] / float(before[key])
    return 1.0 if plan.jobs[name].config.model_dump(mode="json") == old["config"] else None


def flops_rate(plan: Plan, results: Mapping[str, dict[str, Any]]) -> tuple[float, str]:
    """FLOPs per second to reckon with, and where the figure is from."""
    for name, result in results.items():
        if (
            name in plan.jobs
            and _trains(plan, name)
            and result["metrics"].get("flops")
            and result["seconds"] > 1
        ):
            return result["metrics"]["flops"] / result["seconds"], f"the last {name} on this machine"
    rate, source = assumed_rate(plan)
    return rate * plan.runtime.processes, source


def _written(folder: Path) -> int:
    """Bytes of the files that lie in a folder already."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a stage at work deletes old ones
            size += path.stat().st_size if path.is_file() else 0
    return size


def _job(directory: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((directory / "job.json").read_text()))
    except (OSError, ValueError):
        return None


def _result(directory: Path) -> dict[str, Any] | None:
    try:
        return store.read_result(directory)
    except (ValueError, OSError, json.JSONDecodeError):
        return None
