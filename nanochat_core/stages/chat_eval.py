"""What a chat model can do: its accuracy on each task, and ChatCORE, their mean with chance at 0."""

from pydantic import Field, field_validator

from nanochat_core.artifacts.planned import Estimate, Planned, Speed, answer_tokens
from nanochat_core.artifacts.stage import Job, Metrics, Recipe

# Problems of the test splits: answered in words, and by one letter, which is read and not written.
GENERATED = {"gsm8k": 1319, "humaneval": 164, "spellingbee": 256}
CHOSEN = {"mmlu": 14_042, "arc_easy": 2376, "arc_challenge": 1172}
QUESTION_TOKENS = 150
FIVE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")


class Config(Recipe):
    # ChatCORE over six tasks. Over the first five it is another number, given beside it as chatcore_5:
    # spellingbee alone lifts the mean by up to a sixth, so the two are never to be compared.
    tasks: tuple[str, ...] = (*FIVE, "spellingbee")
    problems: int | None = Field(None, ge=1)  # of each task; None: all of its test split
    samples: int = Field(1, ge=1)  # of each generative problem; one right answer is enough
    temperature: float = Field(0.0, ge=0)
    top_k: int | None = Field(50, ge=1)
    max_tokens: int = Field(512, ge=1)  # of an answer
    seed: int = 0

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        from nanochat_core.data.tasks import check_name

        if not tasks:
            raise ValueError("tasks is empty: name at least one")
        return tuple(check_name(name) for name in tasks)

    def check(self, stage: Planned, ranks: int) -> None:
        from nanochat_core.data.tasks.needs import check_rows

        check_rows(f"{stage.name}.tasks", self.tasks, ("test",), stage.reads["assets"].config)

    def estimate(self, stage: Planned, speed: Speed) -> Estimate:
        most = self.problems
        written = sum(min(GENERATED.get(task, most or 0), most or 10**9) for task in self.tasks)
        chosen = sum(min(CHOSEN.get(task, 0), most or 10**9) for task in self.tasks)
        work = written * self.samples * answer_tokens(self.max_tokens) / speed.write
        return Estimate(work + chosen * QUESTION_TOKENS / speed.read, about=True)


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Answer each task's test problems, keep what was said, and add it up."""
    import json

    from nanochat_core.artifacts.store import write_whole
    from nanochat_core.data.tasks import load_task
    from nanochat_core.eval import chat_tasks
    from nanochat_core.infer.engine import Engine
    from nanochat_core.infer.exported import trained_model
    from nanochat_core.machine.ranks import ranks
    from nanochat_core.tokenizer.bpe import load_tokenizer

    partial, answers = job.path / "partial", job.path / "answers"
    partial.mkdir(exist_ok=True)
    answers.mkdir(exist_ok=True)
    tasks = [
        load_task(name, "test", size=cfg.problems, assets=job.inputs.get("assets")) for name in cfg.tasks
    ]
    metrics: Metrics = {}
    gains: dict[str, float] = {}
    with ranks(job.runtime) as world:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        model = trained_model(job.inputs["model"], tokenizer).to(world.device)
        model.compute_dtype = world.dtype
        engine = Engine(model, tokenizer, max_rows=job.runtime.device_batch.get(job.stage, 64))
        for i, task in enumerate(tasks):
            done = partial / f"{task.name.replace('/', '-')}.jsonl"
            if world.any(world.is_first and done.is_file()):
                lines = done.read_text().splitlines() if world.is_first else []
                found = [chat_tasks.GradedAnswer(**json.loads(line)) for line in lines]
            else:
                share = chat_tasks.evaluate_task(
                    engine,
                    task,
                    samples=cfg.samples,
                    temperature=cfg.temperature,
                    top_k=cfg.top_k,
                    max_tokens=cfg.max_tokens,
                    seed=cfg.seed,
                    rank=world.rank,
                    size=world.size,
                )
                found = sorted(world.gather(share))
            if not world.is_first:
                continue
            if not done.is_file():
                write_whole(done, "".join(json.dumps(answer._asdict()) + "\n" for answer in found))
            write_whole(answers / done.name, done.read_bytes())
            value = chat_tasks.accuracy(found)
            gains[task.name] = chat_tasks.centered(task, value)
            metrics[task.name] = value
            if cfg.samples > 1 and task.kind == "generative":
                metrics |= {
                    f"{task.name}_pass_at_{k}": p for k, p in chat_tasks.passes(found, cfg.samples).items()
                }
            job.record(step=i + 1, steps=len(tasks), **{f"chat/{task.name}": value})
            print(f"{task.name}: {value:.4f} of {len(found)}", flush=True)
        if not world.is_first:
            return {}
    scores: Metrics = {"chatcore": sum(gains.values()) / len(gains)}
    if len(gains) > len(FIVE) and set(FIVE) <= set(gains):
        scores["chatcore_5"] = sum(gains[name] for name in FIVE) / len(FIVE)
    return scores | metrics
