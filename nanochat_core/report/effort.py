"""What a run took: time, energy and money by stage, and what stood in its way."""

import statistics
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, NamedTuple

from nanochat_core.artifacts.progress import span
from nanochat_core.artifacts.stage import Metrics
from nanochat_core.machine.hardware import LATEST
from nanochat_core.report.curves import read_rows
from nanochat_core.report.headline import headline
from nanochat_core.report.pages import Block, ReportTable, Text
from nanochat_core.report.rows import Finished

# In training, for where nothing can be read: a Spark at the wall, as others measured it; of the rest a GPU's
# share of its machine.
ASSUMED_WATTS = {"GB10": 120.0, "H100": 900.0, "H200": 900.0, "A100": 550.0, "B200": 1250.0}
CPU_WATTS = 10.0  # a core's, with its share of the rest
JOULES_PER_KWH = 3.6e6
WHY = {
    "started": "its process was ended from outside; the next attempt went on",
    "short_of_memory": "stopped before memory ran out; the next attempt went on with fewer rows at a time",
}


class Energy(NamedTuple):
    """Of one stage."""

    kwh: float
    meter: str  # what was measured, or "assumed"


class Break(NamedTuple):
    """An interruption: what happened, and until when nothing was done."""

    stage: str
    when: float
    seconds: float
    what: str


def energy(row: Finished) -> Energy:
    """What a stage drew: its readings' watts over the time they stand for, or an assumption."""
    readings = [one for one in row.readings() if isinstance(one.get("watts"), int | float)]
    if not readings:
        return Energy(assumed_watts(row) * row.result["seconds"] / JOULES_PER_KWH, "assumed")
    joules, stood = 0.0, 0.0
    for one, after in pairwise(readings):
        seconds = min(after["time"] - one["time"], 2 * LATEST)  # between two attempts nothing is drawn for it
        joules, stood = joules + one["watts"] * max(0.0, seconds), stood + max(0.0, seconds)
    mean = joules / stood if stood else readings[0]["watts"]
    joules += mean * max(0.0, row.result["seconds"] - stood)  # before the first reading and after the last
    return Energy(joules / JOULES_PER_KWH, str(readings[-1].get("meter", "measured")))


def assumed_watts(row: Finished) -> float:
    hardware = row.job.get("provenance", {}).get("hardware", {})
    for name, watts in ASSUMED_WATTS.items():
        if name in hardware.get("gpu", ""):
            return watts * int(row.runtime.get("nproc", 1))
    cores = hardware.get("cpu", "").rpartition(", ")[2].partition(" ")[0]
    return CPU_WATTS * (int(cores) if cores.isdigit() else 1)


def cost(row: Finished, used: Energy) -> float | None:
    """In the user's currency, by the prices that the run was told; None without any."""
    hourly: float | None = row.runtime.get("price_per_hour")
    electricity: float | None = row.runtime.get("price_per_kwh")
    if hourly is None and electricity is None:
        return None
    return (hourly or 0.0) * float(row.result["seconds"]) / 3600 + (electricity or 0.0) * used.kwh


def breaks(name: str, attempts: list[dict[str, Any]]) -> list[Break]:
    """Each time that an attempt ended without a result, and how long nothing was done then."""
    found = []
    ended: float | None = None
    what = ""
    for event in attempts:
        kind, when = event["event"], float(event["time"])
        if kind == "started":
            if what:
                before = float(event.get("previous_end") or 0) if ended is None else ended
                found.append(Break(name, before or when, max(0.0, when - before) if before else 0.0, what))
            ended, what = None, WHY["started"]
        elif kind == "stopped":
            ended, what = when, f"stopped ({event.get('why')}); the next attempt went on"
        elif kind in WHY:
            ended, what = when, WHY[kind]
        elif kind == "finished":
            ended, what = when, ""
        else:
            what = f"{kind}{': ' + str(event['why']) if event.get('why') else ''}"
            ended = when
    return found


def whole(rows: Mapping[str, Finished]) -> Metrics:
    """What the run took altogether, for programs."""
    used = {name: energy(row) for name, row in rows.items()}
    costs = [cost(row, used[name]) for name, row in rows.items()]
    found = [one for name, row in rows.items() for one in breaks(name, row.attempts)]
    total: Metrics = {
        "run/seconds": round(sum(row.result["seconds"] for row in rows.values()), 3),
        "run/kwh": round(sum(one.kwh for one in used.values()), 6),
        "run/restarts": len(found),
        "run/down_seconds": round(sum(one.seconds for one in found), 3),
    }
    if any(one is not None for one in costs):
        total["run/cost"] = round(sum(one or 0.0 for one in costs), 4)
    return total


def when(rows: Mapping[str, Finished]) -> str:
    """From the first attempt's start to the last stage's end, breaks included."""
    ends = [datetime.fromisoformat(row.result["finished"]) for row in rows.values()]
    starts = [
        datetime.fromtimestamp(event["time"], UTC)
        for row in rows.values()
        for event in row.attempts
        if event["event"] == "started"
    ]
    begin, end = min([*starts, *ends]), max(ends)
    until = f"{end:%H:%M}" if begin.date() == end.date() else f"{end:%Y-%m-%d %H:%M}"
    return f"{begin:%Y-%m-%d %H:%M} to {until} UTC"


def speed(row: Finished) -> str:
    """A training stage's TFLOP/s, of all its processes together: the middle of its steps'."""
    rates = [step["tflops"] for step in read_rows(row.directory / "metrics.jsonl") if step.get("tflops")]
    return f"{statistics.median(rates):.3g}" if rates else ""


def effort_blocks(rows: Mapping[str, Finished]) -> list[Block]:
    """A line for each stage, the sum, and every interruption."""
    lines: list[list[str]] = []
    meters: dict[str, None] = {}
    total = whole(rows)
    priced = "run/cost" in total
    speeds = {name: speed(row) for name, row in rows.items()}
    timed = any(speeds.values())
    for name, row in rows.items():
        used = energy(row)
        meters[used.meter] = None
        starts = sum(event["event"] == "started" for event in row.attempts)
        price = cost(row, used)
        lines.append(
            [
                name,
                span(row.result["seconds"]),
                str(max(starts, 1)),
                kwh(used.kwh),
                *([f"{price:.2f}" if price is not None else ""] if priced else []),
                *([speeds[name]] if timed else []),
                headline(row.metrics),
            ]
        )
    end = [*([f"{total['run/cost']:.2f}"] if priced else []), *([""] if timed else [])]
    seconds, drawn = total["run/seconds"], total["run/kwh"]
    assert isinstance(seconds, int | float) and isinstance(drawn, int | float)
    lines.append(["all", span(seconds), "", kwh(drawn), *end, ""])
    head = ["stage", "time", "attempts", "energy", *(["cost"] if priced else [])]
    head += [*(["TFLOP/s"] if timed else []), ""]
    blocks: list[Block] = [ReportTable(head, lines, words=1), Text(meter_words(list(meters), rows))]
    found = [one for name, row in rows.items() for one in breaks(name, row.attempts)]
    if found:
        cells = [
            [one.stage, time.strftime("%Y-%m-%d %H:%M", time.gmtime(one.when)), span(one.seconds), one.what]
            for one in sorted(found, key=lambda one: one.when)
        ]
        blocks.append(
            Text(
                f"{len(found)} interruptions; nothing was done for {span(sum(one.seconds for one in found))}:"
            )
        )
        blocks.append(ReportTable(["stage", "when (UTC)", "down for", "what"], cells, words=1))
    else:
        blocks.append(Text("No interruption: every stage ended in its first attempt."))
    return blocks


def kwh(value: float) -> str:
    return f"{value:.2f} kWh" if value >= 1 else f"{1000 * value:.1f} Wh"


def meter_words(meters: list[str], rows: Mapping[str, Finished]) -> str:
    """Where the energy is from; an assumption is named as one."""
    measured = [meter for meter in meters if meter != "assumed"]
    words = (
        [f"Energy is what the {' and the '.join(measured)} reported to draw, not the whole machine's."]
        if measured
        else []
    )
    if "assumed" in meters:
        row = next(iter(rows.values()))
        if any(
            name in row.job.get("provenance", {}).get("hardware", {}).get("gpu", "") for name in ASSUMED_WATTS
        ):
            basis = "others' measurements of such a machine in training"
        else:
            basis = f"{CPU_WATTS:.0f} W a core"
        where = " where nothing could be read" if measured else ": this machine lets no meter be read"
        words.append(f"Energy is assumed{where} ({assumed_watts(row):.0f} W, by {basis}).")
    machines = max((int(row.runtime.get("nnodes", 1)) for row in rows.values()), default=1)
    if machines > 1:
        words.append(f"It is the first machine's alone: what {machines} machines did together took more.")
    return " ".join(words)
