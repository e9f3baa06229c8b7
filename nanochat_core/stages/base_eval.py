"""CORE of the base model: every task of the bundle, a finished one never twice."""

from pydantic import Field

from nanochat_core.artifacts.planned import Estimate, Planned, Speed
from nanochat_core.artifacts.stage import Job, Metrics, Recipe

CORE_TASKS, CORE_TOKENS = 22, 100e6  # of the published bundle, all of its examples, about
EXAMPLE_TOKENS = 400 * 3  # of one with its choices, about


class Config(Recipe):
    max_per_task: int | None = Field(None, ge=1)  # examples; None: all there are

    def estimate(self, stage: Planned, speed: Speed) -> Estimate | None:
        if stage.reads["assets"].config.source != "hub":
            return None
        most = self.max_per_task
        tokens = CORE_TOKENS if most is None else min(CORE_TOKENS, CORE_TASKS * most * EXAMPLE_TOKENS)
        return Estimate(tokens / speed.read, about=True)


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Evaluate each task, keep its answers, and add up what they come to."""
    from nanochat_core.artifacts.store import write_whole
    from nanochat_core.eval import core
    from nanochat_core.infer.exported import trained_model
    from nanochat_core.machine.ranks import ranks
    from nanochat_core.stages.assets import BUNDLE
    from nanochat_core.tokenizer.bpe import load_tokenizer

    partial, answers = job.path / "partial", job.path / "answers"
    partial.mkdir(exist_ok=True)
    answers.mkdir(exist_ok=True)
    tasks = core.read_bundle(job.inputs["assets"] / BUNDLE)
    scores = []
    with ranks(job.runtime) as world:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        model = trained_model(job.inputs["model"], tokenizer).to(world.device)
        model.compute_dtype = world.dtype
        context = model.config.positions  # longer than it was trained on, as upstream
        found = core.answered(
            model, tokenizer, tasks, partial, world, limit=cfg.max_per_task, context=context
        )
        for i, (task, outcomes) in enumerate(zip(tasks, found, strict=True)):
            if not world.is_first:
                continue
            write_whole(answers / f"{task.label}.jsonl", (partial / f"{task.label}.jsonl").read_bytes())
            scores.append(core.summarize(task, outcomes))
            job.record(step=i + 1, steps=len(tasks), **{f"core/{task.label}": scores[-1].centered})
            print(f"{task.label}: {scores[-1].accuracy:.4f}, centered {scores[-1].centered:.4f}", flush=True)
        if not world.is_first:
            return {}
    write_whole(job.path / "core.csv", core.as_csv(scores))
    metrics: Metrics = {"core": core.core_metric(scores)}
    for score in scores:
        metrics |= {score.label: score.centered, f"{score.label}_accuracy": score.accuracy}
    return metrics
