"""How long, and how much disk: what can be said of a plan before anything runs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core import store
from nanochat_core.plan import Plan, Verdict, latest_run
from nanochat_core.progress import count

CPU_FLOPS = 15e9  # per second and core, for small models in fp32: measured on a 2.5 GHz server core
START_SECONDS = 5.0  # a process, torch and the data, before the first step
CUDA_FLOPS = 50e12  # per second and GPU: 40% of what a GB10 can do in bf16


class Forecast(NamedTuple):
    """What one stage would take. None is "not known", never zero."""

    seconds: float | None
    disk: int | None  # bytes, at the stage's fullest
    facts: Mapping[str, float]


def forecast(plan: Plan, verdicts: Mapping[str, Verdict]) -> tuple[dict[str, Forecast], str]:
    """Each row's share, from its last artefact or its FLOPs; and the rate that these were reckoned with."""
    base_dir = plan.runtime.base_dir
    earlier = latest_run(base_dir, plan.profile) or latest_run(base_dir) or {}
    results = {name: result for name, old in earlier.items() if (result := _result(base_dir / name / old))}
    rate, source = flops_rate(plan, results)
    found = {}
    for name, verdict in verdicts.items():
        facts, old = plan.facts(name), results.get(name)
        seconds: float | None = None
        if verdict.state != "hit":
            if old is not None:
                seconds = old["seconds"] * growth(facts, old["metrics"])
            elif facts.get("flops"):
                seconds = START_SECONDS + facts["flops"] / rate
            if seconds is not None and verdict.step is not None and facts.get("steps"):
                seconds *= max(0.0, 1 - verdict.step / facts["steps"])
        done = _result(plan.jobs[name].path) if verdict.state == "hit" else old
        params = facts.get("params")
        disk: int | None = None
        if done is not None:
            disk = sum(want["size"] for want in done["files"].values())
        elif params:
            disk = round(4 * params)
        if verdict.state != "hit" and params:  # weights and two moments in fp32, for each checkpoint kept
            disk = (disk or 0) + round(12 * params * plan.runtime.keep_checkpoints)
        found[name] = Forecast(seconds, disk, facts)
    return found, f"{count(rate)}FLOP/s, {source}"


def growth(facts: Mapping[str, float], before: Mapping[str, Any]) -> float:
    """How much more work a stage is than it was, by the finest measure that both are known by."""
    for key in ("flops", "tokens", "steps"):
        if facts.get(key) and before.get(key):
            return facts[key] / float(before[key])
    return 1.0


def flops_rate(plan: Plan, results: Mapping[str, dict[str, Any]]) -> tuple[float, str]:
    """FLOPs per second to reckon with, and where the figure is from."""
    for name in ("pretrain", "mid", "sft"):
        result = results.get(name)
        if result and result["metrics"].get("flops") and result["seconds"] > 1:
            return result["metrics"]["flops"] / result["seconds"], f"the last {name} on this machine"
    if plan.runtime.device == "cuda" or (plan.runtime.device == "auto" and Path("/dev/nvidiactl").exists()):
        return CUDA_FLOPS * plan.runtime.nproc, "an assumed GPU"
    return CPU_FLOPS * (os.cpu_count() or 1), "an assumed CPU"


def _result(directory: Path) -> dict[str, Any] | None:
    try:
        return store.read_result(directory)
    except (ValueError, OSError, json.JSONDecodeError):
        return None
