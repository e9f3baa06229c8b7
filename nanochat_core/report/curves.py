"""A stage's curves: what its records measure more than once, and how the machine was meanwhile."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.report.rows import read_lines

CURVE_POINTS = 1500  # of one curve; more cannot be seen
EXACT = ("learning rate, of its peak",)  # a schedule has no noise
SMOOTH_FROM = 100  # points; a curve of more is drawn with its running mean
PANELS = (  # of one stage's figure: key, title
    ("loss", "loss"),
    ("reward", "reward"),
    ("val_bpb", "validation, bits per byte"),
    ("lr", "learning rate, of its peak"),
    ("tokens_per_s", "tokens per second"),
)


class Panel(NamedTuple):
    title: str
    over: str  # what its horizontal axis counts
    points: list[tuple[float, float]]


TICKS = 5  # of a horizontal axis: more would run into each other
UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
READINGS = (  # of the machine, by the minute
    ("memory_gb", "memory in use, GB"),
    ("celsius", "degrees Celsius"),
    ("watts", "watts"),
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; where a resumed attempt went back, what it did again replaces the old."""
    rows: dict[float, dict[str, Any]] = {}
    for row in read_lines(path):
        if isinstance(row.get("step"), int | float):
            rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]


def curve_svg(rows: Sequence[Mapping[str, Any]], readings: Sequence[Mapping[str, Any]] = ()) -> str:
    """A stage's curves as an inline picture, or nothing if there is no curve to draw. The machine's are only
    drawn beside a stage's own."""
    found = panels(rows)
    if not found:
        return ""
    out = io.StringIO()
    draw(found + machine_panels(readings)).savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def curve_png(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """A stage's curves as a data URI, for a page that strips inline SVG; empty if there is none to draw."""
    found = panels(rows)
    if not found:
        return ""
    figure = draw(found, columns=2)
    figure.suptitle(title, fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=80)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """One for each thing a stage's rows measure more than once, over its steps."""
    found = []
    for key, title in PANELS:
        points = [(row["step"], row[key]) for row in rows if finite(row.get(key))]
        if len(points) > 1:
            found.append(Panel(title, "step", points[:: math.ceil(len(points) / CURVE_POINTS)]))
    return found


def machine_panels(readings: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The machine over the stage's time, breaks included: in seconds, minutes or hours, as it took."""
    if not readings:
        return []
    begin = readings[0]["time"]
    took = readings[-1]["time"] - begin
    over, unit = next(((name, size) for name, size in UNITS if took > 3 * size), UNITS[-1])
    found = []
    for key, title in READINGS:
        points = [((row["time"] - begin) / unit, row[key]) for row in readings if finite(row.get(key))]
        if len(points) > 1:
            found.append(Panel(title, over, points[:: math.ceil(len(points) / CURVE_POINTS)]))
    return found


def draw(found: Sequence[Panel], *, columns: int = 4) -> Any:
    from matplotlib.figure import Figure  # no pyplot: nothing global, any thread
    from matplotlib.ticker import MaxNLocator

    lines = math.ceil(len(found) / columns)
    columns = math.ceil(len(found) / lines)  # five are three and two, not four and one
    figure = Figure(figsize=(3.1 * columns, 2.3 * lines), layout="constrained")
    for i, (title, over, points) in enumerate(found):
        axes = figure.add_subplot(lines, columns, i + 1)
        noisy = len(points) > SMOOTH_FROM and title not in EXACT
        axes.plot(*zip(*points, strict=True), color="#33507a", linewidth=1.1, alpha=0.3 if noisy else 1)
        if noisy:
            axes.plot(
                [step for step, _ in points], smoothed([y for _, y in points]), color="#33507a", linewidth=1.3
            )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(over, fontsize=7, labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(TICKS, integer=over == "step"))
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
