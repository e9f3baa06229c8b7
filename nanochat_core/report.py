"""A view over finished jobs, read from their directories: what was run, what it gained, how long it took."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core import store
from nanochat_core.progress import count, headline, span
from nanochat_core.stage import Metrics

CURVE_POINTS = 1500  # of one curve; more cannot be seen
SMOOTH_FROM = 100  # points; a curve of more is drawn with its running mean
MODELS = ("base", "mid", "sft", "rl")
EVALUATIONS = {"base_eval": "base", "mid_eval": "mid", "sft_eval": "sft", "rl_eval": "rl"}
SCORES = {"base_eval": "core", "mid_eval": "chatcore", "sft_eval": "chatcore", "rl_eval": "chatcore"}
MEASURES = {
    "val_bpb": "bits per byte",
    "reward": "reward",
    "loss": "loss",
    "chatcore": "ChatCORE",
    "core": "CORE",
}
PANELS = (  # of one stage's figure: key, title
    ("loss", "loss"),
    ("reward", "reward"),
    ("val_bpb", "validation, bits per byte"),
    ("lr", "learning rate, of its peak"),
    ("tokens_per_s", "tokens per second"),
)
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 62rem; margin: 2.5rem auto; }
body { padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; }
h2 { margin-top: 2.6rem; border-bottom: 1px solid #dde2ea; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #e6eaf0; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { color: #5a6675; font-weight: 600; }
pre { background: #f5f7fa; padding: .8rem 1rem; border-radius: 6px; }
pre { font-size: .85rem; white-space: pre-wrap; }
svg { max-width: 100%; height: auto; }
summary { cursor: pointer; color: #33507a; } .wide { overflow-x: auto; }
"""


class Finished(NamedTuple):
    """One row's directory, read."""

    directory: Path
    job: dict[str, Any]
    result: dict[str, Any]
    attempts: list[dict[str, Any]]

    @property
    def metrics(self) -> Metrics:
        return dict(self.result["metrics"])


class Text(NamedTuple):
    text: str


class Table(NamedTuple):
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Curve(NamedTuple):
    name: str
    svg: str


class Quote(NamedTuple):
    """Something long that the HTML folds away under its title."""

    title: str
    text: str


Block = Text | Table | Curve | Quote


@dataclass(frozen=True)
class Report:
    """Headings with what stands under them, and the numbers a program reads."""

    title: str
    sections: Sequence[tuple[str, Sequence[Block]]]
    metrics: Metrics


def collect(inputs: Mapping[str, Path], *, samples: int = 3) -> Report:
    """Read the rows' directories (row -> directory, in the table's order) and lay the report out."""
    rows = {name: read_finished(directory) for name, directory in inputs.items()}
    metrics = headline_metrics({name: row.metrics for name, row in rows.items()})
    first = next(iter(rows.values()), None)
    profile = first.job.get("profile", "") if first else ""
    sections: list[tuple[str, Sequence[Block]]] = [("What it came to", summary(rows, metrics))]
    tasks = task_table(metrics)
    if tasks:
        sections.append(("Every task, before and after", tasks))
    core = core_table(rows)
    if core:
        sections.append(("CORE, task by task", core))
    curves = [
        Curve(name, svg)
        for name, row in rows.items()
        if (svg := curve_svg(read_rows(row.directory / "metrics.jsonl")))
    ]
    if curves:
        sections.append(("Curves", curves))
    quotes = sample_quotes(rows, samples)
    if quotes:
        sections.append(("In its own words", quotes))
    sections.append(("Time", time_blocks(rows)))
    sections.append(("What was run", provenance_blocks(rows)))
    return Report(f"nanochat report: {Path(profile).stem}", sections, metrics)


def read_finished(directory: Path) -> Finished:
    result = store.read_result(directory)
    if result is None:
        raise ValueError(f"{directory} is not finished; the report reads finished stages only")
    job = json.loads((directory / "job.json").read_text())
    return Finished(directory, job, result, store.read_attempts(directory))


def headline_metrics(rows: Mapping[str, Metrics]) -> Metrics:
    """The run's numbers by their public names: `base/val_bpb`, `rl/reward`, `<stage>/<task>` and so on."""
    found: Metrics = {}
    pretrain, losses = rows.get("pretrain", {}), rows.get("base_loss", {})
    for key in ("params", "tokens", "flops", "val_bpb_start"):
        if key in pretrain:
            found[f"base/{key}"] = pretrain[key]
    val = losses.get("val_bpb", pretrain.get("val_bpb"))
    if val is not None:
        found["base/val_bpb"] = val
    for stage in ("mid", "sft", "rl"):
        for key in ("val_bpb_start", "val_bpb", "reward_start", "reward"):
            if key in rows.get(stage, {}):
                found[f"{stage}/{key}"] = rows[stage][key]
    for row, model in EVALUATIONS.items():
        for key, value in rows.get(row, {}).items():
            if isinstance(value, int | float):
                found[f"{model}/{key}"] = value
    return found


def summary(rows: Mapping[str, Finished], metrics: Metrics) -> list[Block]:
    """One line for each thing that was to get better: where it began, where it ended."""
    lines = []
    for name, row in rows.items():
        if name in EVALUATIONS:
            continue
        for key, value in row.metrics.items():
            start = row.metrics.get(f"{key}_start")
            if isinstance(value, int | float) and isinstance(start, int | float):
                lines.append(
                    [name, MEASURES.get(key, key), number(start), number(value), signed(value - start)]
                )
    scores = [(model, metrics[f"{model}/chatcore"]) for model in MODELS if f"{model}/chatcore" in metrics]
    before: float | None = None
    for model, score in scores:
        assert isinstance(score, int | float)
        gain = signed(score - before) if before is not None else ""
        lines.append([model, "ChatCORE", number(before), number(score), gain])
        before = score
    if "base/core" in metrics:
        lines.append(["base", "CORE", "", number(metrics["base/core"]), ""])
    blocks: list[Block] = []
    if "base/params" in metrics:
        size = f"A model of {count(float(metrics['base/params'] or 0))} parameters"
        seen = (
            f", trained on {count(float(metrics['base/tokens'] or 0))} tokens"
            if "base/tokens" in metrics
            else ""
        )
        blocks.append(
            Text(f"{size}{seen}, in {span(sum(row.result['seconds'] for row in rows.values()))} of work.")
        )
    if lines:
        blocks.append(Table(["stage", "measure", "before", "after", "change"], lines))
        blocks.append(Text("Of bits per byte and loss less is better, of everything else more."))
    return blocks


def task_table(metrics: Metrics) -> list[Block]:
    """Accuracy of each chat task, by model; the gain is from the first model measured to the last."""
    chat = [model for model in MODELS if f"{model}/chatcore" in metrics]
    tasks = dict.fromkeys(
        key.partition("/")[2]
        for model in chat
        for key in metrics
        if key.startswith(f"{model}/") and not key.endswith(("/chatcore", "/val_bpb", "_start", "/reward"))
    )
    lines = []
    for task in [*tasks, "chatcore"]:
        values = [metrics.get(f"{model}/{task}") for model in chat]
        known = [value for value in values if isinstance(value, int | float)]
        gain = signed(known[-1] - known[0]) if len(known) > 1 else ""
        lines.append([MEASURES.get(task, task), *(number(value) for value in values), gain])
    return [Table(["task", *(model.upper() for model in chat), "gain"], lines)] if chat else []


def core_table(rows: Mapping[str, Finished]) -> list[Block]:
    measured = rows["base_eval"].metrics if "base_eval" in rows else {}
    lines = [
        [MEASURES.get(key, key), number(measured.get(f"{key}_accuracy")), number(value)]
        for key, value in measured.items()
        if isinstance(value, int | float) and not key.endswith("_accuracy")
    ]
    note = "The score is the accuracy, centred so that guessing is 0 and always being right is 1."
    return [Table(["task", "accuracy", "score"], lines), Text(note)] if lines else []


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
    return quotes


def time_blocks(rows: Mapping[str, Finished]) -> list[Block]:
    lines, notes = [], []
    for name, row in rows.items():
        starts = sum(event["event"] == "started" for event in row.attempts)
        lines.append([name, span(row.result["seconds"]), str(max(starts, 1)), headline(row.metrics)])
        ended: str | None = None
        for event in row.attempts:
            if event["event"] == "started" and ended is not None:
                notes.append(f"{name}: {ended}")
            ended = {
                "started": "its process was ended from outside; the next attempt went on",
                "stopped": f"stopped ({event.get('why')}); the next attempt went on",
                "finished": None,
            }.get(event["event"])
    total = span(sum(row.result["seconds"] for row in rows.values()))
    blocks: list[Block] = [Table(["stage", "time", "attempts", ""], [*lines, ["all", total, "", ""]])]
    if notes:
        blocks.append(Quote("Interruptions", "\n".join(notes)))
    return blocks


def provenance_blocks(rows: Mapping[str, Finished]) -> list[Block]:
    """The machine and the code, and every stage's recipe in full."""
    facts: dict[str, dict[str, None]] = {}
    for row in rows.values():
        record = row.job.get("provenance", {})
        versions = " ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
        commit = record.get("commit")
        facts.setdefault("commit", {})[
            f"{commit}{' with changes' if record.get('dirty') else ''}" if commit else "none"
        ] = None
        facts.setdefault("code", {})[str(record.get("code", "unknown"))] = None
        facts.setdefault("machine", {})[f"{record.get('machine', '')}, Python {record.get('python', '')}"] = (
            None
        )
        facts.setdefault("versions", {})[versions] = None
    blocks: list[Block] = [Table(["", ""], [[key, "; ".join(values)] for key, values in facts.items()])]
    if len(facts.get("code", {})) > 1:
        blocks.append(
            Text("Not all stages were made by the same code: some are older than it and were kept.")
        )
    for name, row in rows.items():
        recipe = "\n".join(f"{key} = {json.dumps(value)}" for key, value in row.job.get("config", {}).items())
        blocks.append(Quote(f"{name} ({row.job.get('fingerprint')})", recipe or "(nothing to set)"))
    return blocks


def number(value: float | int | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.4f}"


# Curves.


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; where a resumed attempt went back, what it did again replaces the old."""
    rows: dict[float, dict[str, Any]] = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut by a power loss
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def curve_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """A stage's curves as an inline picture, or nothing if there is no curve to draw."""
    figure = draw(rows)
    if figure is None:
        return ""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def curve_png(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """A stage's curves as a data URI, for a page that strips inline SVG; empty if there is none to draw."""
    figure = draw(rows, columns=2)
    if figure is None:
        return ""
    figure.suptitle(title, fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=80)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def draw(rows: Sequence[Mapping[str, Any]], *, columns: int = 4) -> Any:
    """One panel for each thing a stage's rows measure more than once."""
    panels = []
    for key, title in PANELS:
        points = [(row["step"], row[key]) for row in rows if finite(row.get(key))]
        if len(points) > 1:
            panels.append((title, points[:: math.ceil(len(points) / CURVE_POINTS)]))
    if not panels:
        return None
    from matplotlib.figure import Figure  # no pyplot: nothing global, any thread

    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.3 * lines), layout="constrained")
    for i, (title, points) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        noisy = len(points) > SMOOTH_FROM
        axes.plot(*zip(*points, strict=True), color="#33507a", linewidth=1.1, alpha=0.3 if noisy else 1)
        if noisy:
            axes.plot(
                [step for step, _ in points], smoothed([y for _, y in points]), color="#33507a", linewidth=1.3
            )
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
    return figure


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean that forgets over a fiftieth of the curve."""
    keep = 1 - 50 / len(values)
    mean, out = values[0], []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        out.append(mean)
    return out


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# The two renderings.


def write_report(report: Report, directory: Path) -> None:
    """report.md, report.html (one file that needs no other) and the curves that report.md shows."""
    for _, blocks in report.sections:
        for block in blocks:
            if isinstance(block, Curve):
                (directory / "curves").mkdir(exist_ok=True)
                store.write_whole(directory / "curves" / f"{block.name}.svg", block.svg)
    store.write_whole(directory / "report.md", to_markdown(report))
    store.write_whole(directory / "report.html", to_html(report))


def to_markdown(report: Report) -> str:
    parts = [f"# {report.title}"]
    for heading, blocks in report.sections:
        parts.append(f"## {heading}")
        for block in blocks:
            match block:
                case Text(text):
                    parts.append(text)
                case Table(head, rows):
                    align = ["---", *("---:" for _ in head[1:])]
                    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, align, *rows]]
                    parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
                case Curve(name, _):
                    parts.append(f"**{name}**\n\n![{name}](curves/{name}.svg)")
                case Quote(title, text):
                    parts.append(f"**{title}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    return "\n\n".join(parts) + "\n"


def to_html(report: Report) -> str:
    parts = [f"<h1>{html.escape(report.title)}</h1>"]
    for heading, blocks in report.sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for block in blocks:
            match block:
                case Text(text):
                    parts.append(f"<p>{html.escape(text)}</p>")
                case Table(head, rows):
                    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
                    body = "".join(
                        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                        for row in rows
                    )
                    first = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
                    parts.append(f'<div class="wide"><table>{first}<tbody>{body}</tbody></table></div>')
                case Curve(name, svg):
                    parts.append(f"<h3>{html.escape(name)}</h3>{svg}")
                case Quote(title, text):
                    parts.append(
                        f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
                    )
    head = f'<meta charset="utf-8"><title>{html.escape(report.title)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
