"""From the rows' directories to a report: what stands in it, and under which headings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanochat_core.artifacts.progress import count, span
from nanochat_core.artifacts.stage import Metrics, Stage
from nanochat_core.report.curves import curve_svg, read_rows
from nanochat_core.report.effort import effort_blocks, when, whole
from nanochat_core.report.pages import Block, Curve, Quote, Report, ReportTable, Text, number, signed
from nanochat_core.report.published import D20, core_name
from nanochat_core.report.rows import Finished, read_finished, read_lines

MEASURES = {
    "val_bpb": "bits per byte",
    "reward": "reward",
    "loss": "loss",
    "chatcore": "ChatCORE",
    "chatcore_5": "ChatCORE without SpellingBee",
}
LEARNED = ("val_bpb_start", "val_bpb", "reward_start", "reward", "reward_se_start", "reward_se")
NO_TASKS = (
    "chatcore",
    "chatcore_5",
    "core",
    "val_bpb",
    "reward",
    "reward_se",
)  # what stands beside the tasks


def collect(inputs: Mapping[str, Path], stages: Mapping[str, Stage], *, samples: int = 3) -> Report:
    """Read the rows' directories (row -> directory, in the table's order) and lay the report out."""
    rows = {name: read_finished(directory, stages[name]) for name, directory in inputs.items()}
    metrics = headline_metrics(rows) | whole(rows)
    first = next(iter(rows.values()), None)
    profile = first.job.get("profile", "") if first else ""
    sections: list[tuple[str, Sequence[Block]]] = [("What it came to", summary(rows, metrics))]
    tasks = task_table(metrics)
    if tasks:
        sections.append(("BASE, MID, SFT and RL", tasks))
    sections.append(("Beside published runs", published_blocks(rows, metrics)))
    core = core_table(rows)
    if core:
        sections.append((f"{measure('core', metrics)}, task by task", core))
    curves = [
        Curve(name, svg)
        for name, row in rows.items()
        if (svg := curve_svg(read_rows(row.directory / "metrics.jsonl"), row.readings()))
    ]
    if curves:
        sections.append(("Curves", curves))
    quotes = sample_quotes(rows, samples)
    if quotes:
        sections.append(("In its own words", quotes))
    sections.append(("Time, energy and what stood in the way", effort_blocks(rows)))
    sections.append(("What was run", provenance_blocks(rows)))
    return Report(f"nanochat report: {Path(profile).stem}", sections, metrics)


def headline_metrics(rows: Mapping[str, Finished]) -> Metrics:
    """The run's numbers by their public names: `base/val_bpb`, `rl/reward`, `<model>/<task>` and so on. What
    a later row measured of a model counts."""
    found: Metrics = {}
    for row in rows.values():
        model, metrics = row.stage.trains or row.stage.measures, row.metrics
        for key in row.stage.shows or (LEARNED if row.stage.trains else metrics):
            if model and isinstance(metrics.get(key), int | float):
                found[f"{model}/{key}"] = metrics[key]
    return found


def models_of(metrics: Metrics) -> list[str]:
    """The models that public names begin with, in the table's order."""
    return list(dict.fromkeys(key.partition("/")[0] for key in metrics))


def summary(rows: Mapping[str, Finished], metrics: Metrics) -> list[Block]:
    """One line for each thing that was to get better: where it began, where it ended."""
    lines = []
    for name, row in rows.items():
        if row.stage.measures:
            continue
        for key, value in row.metrics.items():
            start = row.metrics.get(f"{key}_start")
            if key.endswith("_se"):
                continue  # beside the number that it is the standard error of
            if isinstance(value, int | float) and isinstance(start, int | float):
                shown = (_with_noise(row.metrics, key, end) for end in ("_start", ""))
                lines.append([name, MEASURES.get(key, key), *shown, signed(value - start)])
    scores = [
        (model, metrics[f"{model}/chatcore"])
        for model in models_of(metrics)
        if f"{model}/chatcore" in metrics
    ]
    before: float | None = None
    others = False
    for i, (model, score) in enumerate(scores):
        assert isinstance(score, int | float)
        if i and tasks_of(metrics, scores[i - 1][0]) != tasks_of(metrics, model):
            others, before = True, None
        gain = signed(score - before) if before is not None else ""
        lines.append([model, "ChatCORE", number(before), number(score), gain])
        before = score
    if "base/core" in metrics:
        lines.append(["base", measure("core", metrics), "", number(metrics["base/core"]), ""])
    blocks: list[Block] = []
    if "base/params" in metrics:
        size = f"A model of {count(float(metrics['base/params'] or 0))} parameters"
        seen = (
            f", trained on {count(float(metrics['base/tokens'] or 0))} tokens"
            if "base/tokens" in metrics
            else ""
        )
        blocks.append(
            Text(
                f"{size}{seen}, in {span(sum(row.result['seconds'] for row in rows.values()))} of work "
                f"({when(rows)})."
            )
        )
    blocks += [
        Text(f"{name} {row.metrics['stopped']}.") for name, row in rows.items() if "stopped" in row.metrics
    ]
    if lines:
        noisy = any("±" in cell for line in lines for cell in line)
        blocks.append(ReportTable(["stage", "measure", "before", "after", "change"], lines, names=2))
        noise = " What follows ± is the standard error over the problems asked." if noisy else ""
        blocks.append(Text(f"Of bits per byte and loss less is better, of everything else more.{noise}"))
    if others:
        blocks.append(Text("A ChatCORE over other tasks than the one before it is not set beside that."))
    return blocks


def _with_noise(metrics: Metrics, key: str, end: str) -> str:
    """A measure, and its standard error where the stage gives one."""
    spread = metrics.get(f"{key}_se{end}")
    shown = number(metrics[f"{key}{end}"])
    return shown if spread is None else f"{shown} ± {number(spread)}"


def measure(key: str, metrics: Metrics) -> str:
    """A measure as people call it; `metrics` are by their public names."""
    return core_name(tasks_of(metrics, "base")) if key == "core" else MEASURES.get(key, key)


def tasks_of(metrics: Metrics, model: str) -> set[str]:
    """The tasks that a model was given."""
    keys = {key.partition("/")[2] for key in metrics if key.startswith(f"{model}/")}
    return {
        key for key in keys if key not in NO_TASKS and not key.endswith("_start") and "_pass_at_" not in key
    }


def task_table(metrics: Metrics) -> list[Block]:
    """What each model can do: its text, its tasks, ChatCORE; the gain is from the first one measured to the
    last, and of ChatCORE only if both were over the same tasks."""
    chat = [model for model in models_of(metrics) if f"{model}/chatcore" in metrics]
    models = [model for model in models_of(metrics) if model in chat or f"{model}/core" in metrics]
    tasks = dict.fromkeys(
        key.partition("/")[2] for model in chat for key in metrics if key.startswith(f"{model}/")
    )
    kept = [task for task in tasks if task not in NO_TASKS and not task.endswith("_start")]
    wanted = ["core", "val_bpb"] if "base" in models else []
    lines = []
    for task in [*wanted, *kept, *(["chatcore_5", "chatcore"] if chat else [])]:
        owners = ["base"] if task in ("core", "val_bpb") else chat
        values = [metrics.get(f"{model}/{task}") if model in owners else None for model in models]
        known = [value for value in values if isinstance(value, int | float)]
        same = task != "chatcore" or tasks_of(metrics, chat[0]) == tasks_of(metrics, chat[-1])
        gain = signed(known[-1] - known[0]) if len(known) > 1 and same else ""
        if known:
            lines.append([measure(task, metrics), *(number(value) for value in values), gain])
    return [ReportTable(["task", *(model.upper() for model in models), "gain"], lines)] if lines else []


def published_blocks(rows: Mapping[str, Finished], metrics: Metrics) -> list[Block]:
    """The same measures as others published them, where they are the same: on the published tasks."""
    if not any(row.job["config"].get("source") == "hub" for row in rows.values()):
        marks = "; ".join(f"{run.what}: CORE {run.numbers['base/core']:.4f}" for run in D20)
        return [
            Text(
                "This run was measured on tasks of its own, so its numbers stand beside nobody else's. For "
                f"orientation, on the 22 published tasks: {marks}."
            )
        ]
    keys = [key for key in dict.fromkeys(key for run in D20 for key in run.numbers) if key in metrics]
    lines = [
        [f"{key.partition('/')[0].upper()} {measure(key.partition('/')[2], metrics)}",
         number(metrics[key]), *(number(run.numbers.get(key)) for run in D20)]
        for key in keys
    ]  # fmt: skip
    note = (
        "One recipe spreads over .0165 of CORE from run to run; bits per byte compare only on the "
        "same text; ChatCORE only over the same six tasks."
    )
    return [ReportTable(["", "this run", *(run.what for run in D20)], lines), Text(note)] if lines else []


def core_table(rows: Mapping[str, Finished]) -> list[Block]:
    evaluated = [row.metrics for row in rows.values() if row.stage.measures and "core" in row.metrics]
    measured = evaluated[0] if evaluated else {}
    lines = [
        [
            core_name(measured) if key == "core" else key,
            number(measured.get(f"{key}_accuracy")),
            number(value),
        ]
        for key, value in measured.items()
        if isinstance(value, int | float) and not key.endswith("_accuracy")
    ]
    note = "The score is the accuracy, centred so that guessing is 0 and always being right is 1."
    return [ReportTable(["task", "accuracy", "score"], lines), Text(note)] if lines else []


def sample_quotes(rows: Mapping[str, Finished], most: int) -> list[Block]:
    """What stages left in samples.md, cut to the first few; a sample begins with a heading."""
    quotes: list[Block] = []
    for name, row in rows.items():
        path = row.directory / "samples.md"
        if path.exists():
            parts = path.read_text().split("\n#")
            quotes.append(
                Quote(f"{name}: samples", "\n#".join(parts[: most + (not parts[0].startswith("#"))]))
            )
    for name, row in rows.items():
        chats = row.stage.measures and "chatcore" in row.metrics
        files = sorted((row.directory / "answers").glob("*.jsonl")) if chats else []
        lines = [line for path in files for line in first_answers(path)]
        if lines:
            quotes.append(Quote(f"{name}: first answers", "\n".join(lines)))
    return quotes


def first_answers(path: Path) -> list[str]:
    """The first right and the first wrong answer of a task."""
    shown: dict[str, str] = {}
    for answer in read_lines(path):
        for right, said in zip(answer["correct"], answer["said"], strict=False):
            shown.setdefault("right" if right else "wrong", said)
    return [f"{path.stem}, {mark}: {said}" for mark, said in shown.items()]


def provenance_blocks(rows: Mapping[str, Finished]) -> list[Block]:
    """The machine and the code, and every stage's recipe in full."""
    facts: dict[str, dict[str, None]] = {}
    for row in rows.values():
        record = row.job.get("provenance", {})
        versions = " ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
        commit = record.get("commit")
        facts.setdefault("commit", {})[
            f"{commit[:12]}{' with changes' if record.get('dirty') else ''}" if commit else "none"
        ] = None
        facts.setdefault("code", {})[str(record.get("code", "unknown"))] = None
        facts.setdefault("machine", {})[f"{record.get('machine', '')}, Python {record.get('python', '')}"] = (
            None
        )
        facts.setdefault("versions", {})[versions] = None
        for key, words in record.get("hardware", {}).items():
            if words:
                facts.setdefault(key, {})[words] = None
    first = next(iter(rows.values()))
    runtime = {key: value for key, value in first.runtime.items() if value not in (None, {}, [])}
    facts["when"] = {when(rows): None}
    facts["profile"] = {str(first.job.get("profile", "")): None}
    facts["runtime"] = {" ".join(f"{key}={value}" for key, value in runtime.items()): None}
    blocks: list[Block] = [
        ReportTable(["", ""], [[key, "; ".join(values)] for key, values in facts.items()], words=1)
    ]
    if len(facts.get("code", {})) > 1:
        blocks.append(
            Text("Not all stages were made by the same code: some are older than it and were kept.")
        )
    for name, row in rows.items():
        recipe = "\n".join(f"{key} = {json.dumps(value)}" for key, value in row.job.get("config", {}).items())
        blocks.append(Quote(f"{name} ({row.job.get('fingerprint')})", recipe or "(nothing to set)"))
    return blocks
