"""Does RL raise the reward it trains on by more than noise? One run per seed, from the same fine-tuned model.

    uv run python benchmarks/rl_margin.py [--profile cpu-demo] [--seeds 1 2 3] [--base-dir DIR] [--json]

Each run is examined before and after on the same held-out problems with the same random numbers, so the gain
is a mean of differences, problem by problem, and its standard error is theirs. The seeds differ in the order
of questions and in every sampled answer. What is finished is not run again, as `nanochat run` has it.
"""

import argparse
import json
import math
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.runner import plan as plans
from nanochat_core.runner.launch import launch


class Gain(NamedTuple):
    """One seed's reward on held-out problems."""

    seed: int
    before: float
    after: float
    differences: dict[int, float]  # of each problem
    stopped: str | None  # by the collapse monitor

    @property
    def error(self) -> float:
        """Standard error of the gain, over problems."""
        return standard_error(self.differences.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="cpu-demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base-dir", type=Path, default=Path("~/.cache/nanochat"))
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    base_dir = args.base_dir.expanduser().absolute()
    gains = []
    print(f"{'seed':>6} {'before':>8} {'after':>8} {'gain':>8} {'std. error':>11} {'gain / error':>13}")
    for seed in args.seeds:
        gains.append(gain := run(args.profile, seed, base_dir, args.set))
        change = gain.after - gain.before
        print(
            f"{seed:>6} {gain.before:>8.3f} {gain.after:>8.3f} {change:>+8.3f} {gain.error:>11.3f} "
            f"{change / gain.error:>13.1f}{'  ' + gain.stopped if gain.stopped else ''}",
            flush=True,
        )
    found = summary(gains)
    print(
        f"mean gain {found['gain']:+.3f}: {found['margin_by_problems']:.1f} standard errors by the problems"
    )
    if len(gains) > 1:
        print(f"spread over the seeds {found['spread']:.3f}: {found['margin_by_seeds']:.1f} of theirs")
    if args.json:
        runs = [
            {"seed": g.seed, "before": g.before, "after": g.after, "error": g.error, "stopped": g.stopped}
            for g in gains
        ]
        print(
            json.dumps(
                {"profile": args.profile, "problems": len(gains[0].differences), **found, "runs": runs}
            )
        )


def run(profile: str, seed: int, base_dir: Path, sets: list[str]) -> Gain:
    """Make whatever is not there yet, then compare the examinations at both ends."""
    plan = plans.load(profile, [*sets, f"rl.seed={seed}"], base_dir=base_dir, until="rl")
    for row in plans.needed(plan, "rl", plans.explain(plan)):
        launch(plan, row)
    path = plan.jobs["rl"].path
    result = store.read_result(path)
    assert result is not None
    metrics = result["metrics"]
    before, after = (rewards(path, step) for step in (0, int(metrics["steps"])))
    return Gain(
        seed,
        statistics.mean(before.values()),
        statistics.mean(after.values()),
        {problem: after[problem] - before[problem] for problem in before},
        metrics.get("stopped"),
    )


def rewards(path: Path, step: int) -> dict[int, float]:
    """Each problem's mean reward at an examination."""
    lines = (path / "answers" / f"step_{step:06d}.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {row["problem"]: statistics.mean(row["rewards"]) for row in rows}


def summary(gains: list[Gain]) -> dict[str, float]:
    """The mean gain, and how far it is from nothing by two measures of noise."""
    changes = [gain.after - gain.before for gain in gains]
    mean = statistics.mean(changes)
    # All seeds answer the same problems: a problem's gains are averaged before its noise is looked at.
    by_problem = [statistics.mean(gain.differences[i] for gain in gains) for i in gains[0].differences]
    found = {"gain": mean, "margin_by_problems": mean / standard_error(by_problem)}
    if len(gains) > 1:
        found |= {"spread": statistics.stdev(changes), "margin_by_seeds": mean / standard_error(changes)}
    return found


def standard_error(values: Collection[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


if __name__ == "__main__":
    main()
