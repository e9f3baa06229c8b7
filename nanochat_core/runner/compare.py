"""Two side by side: profiles before they run, and runs when they have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.artifacts.progress import span
from nanochat_core.artifacts.stage import Metrics
from nanochat_core.report import headline_metrics, read_finished
from nanochat_core.report.published import EXPECTED
from nanochat_core.runner.estimate import forecast, needs
from nanochat_core.runner.plan import Plan, Verdict, latest_run, latest_table
from nanochat_core.runner.table import load_table


def plan_facts(plan: Plan) -> dict[str, float | str | None]:
    """What a profile is and costs from its start, whatever has been done of it already."""
    verdicts = {name: Verdict("run", "") for name in plan.jobs}
    costs, rate = forecast(plan, verdicts)
    if plan.base is None:
        raise ValueError(f"profile {plan.profile} trains no model")
    facts, reads, here = plan.facts(plan.base), plan.planned(plan.base).reads, costs[plan.base].seconds
    expected = EXPECTED.get(Path(plan.profile).stem)
    config = plan.jobs[plan.base].config.model_dump()
    read = {role: source.config.model_dump() for role, source in reads.items()}
    there: str | None = None
    if expected is not None:
        slow, fast = (facts["flops"] / (plan.runtime.processes * each) for each in expected.rates)
        unit, name = (86400, "days") if slow > 2 * 86400 else (3600, "h")
        there = f"{fast / unit:.1f} to {slow / unit:.1f} {name} ({expected.reason})"
    return {
        "what": plan.title,
        "recipe": config.get("arch"),
        "depth": config.get("depth"),
        "vocabulary": read.get("tokenizer", {}).get("vocab_size"),
        "text": str(read.get("text", {}).get("source")),
        "params": facts.get("params"),
        "tokens": facts.get("tokens"),
        "batch": facts.get("batch"),
        "steps": facts.get("steps"),
        "FLOPs": facts.get("flops"),
        "disk": needs(plan, verdicts).disk,
        "pretraining there": there,
        "pretraining here": f"{span(here)} ({rate})" if here else None,
        "CORE to expect": expected.core if expected else None,
    }


class Run(NamedTuple):
    """A run as it was left: a row each, by name."""

    name: str
    metrics: Metrics
    recipe: dict[str, Any]  # "sft.steps" -> value
    seconds: dict[str, float]
    commit: str


def find_run(base_dir: Path, name: str) -> Run:
    """A profile's latest run, or the run that a report's directory belongs to."""
    directory = Path(name)
    if (directory / "job.json").is_file():
        record = json.loads((directory / "job.json").read_text())
        table = load_table(record.get("stages", []))
        if not table[record["stage"]].reports:
            raise ValueError(f"{directory} is no report: name a profile, or the directory of its report")
        root = directory.resolve().parents[1]
        jobs = {row: source["fingerprint"] for row, source in record["inputs"].items()}
    else:
        root, table = base_dir, latest_table(base_dir, name)
        jobs = latest_run(base_dir, name) or {}
    found = {}
    for row, fingerprint in jobs.items():
        path = root / row / fingerprint
        if row in table and not table[row].reports and store.read_result(path) is not None:
            found[row] = read_finished(path, table[row])
    if not found:
        raise ValueError(f"there is no finished run of {name} in {base_dir}; try: nanochat run {name}")
    recipe = {f"{row}.{key}": value for row, one in found.items() for key, value in one.job["config"].items()}
    commits = {str(one.job.get("provenance", {}).get("commit"))[:12] for one in found.values()}
    return Run(
        name,
        headline_metrics(found),
        recipe,
        {row: float(one.result["seconds"]) for row, one in found.items()},
        ", ".join(sorted(commits)),
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that are not the same in both, with both values; None where one has none."""
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}
