"""From a profile and overrides to jobs, and what would happen to each: hit, resume or run, and why."""

import json
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from nanochat_core.artifacts import mirror, store
from nanochat_core.artifacts.planned import Planned
from nanochat_core.artifacts.progress import span
from nanochat_core.artifacts.stage import Job, Recipe, Runtime, fingerprint
from nanochat_core.runner.table import Table, UsageError, load_table, located, unknown

M = TypeVar("M", Recipe, Runtime)
PROFILES = Path(__file__).parents[1] / "profiles"
COSTLY_SECONDS = 3600.0  # finished work that a changed recipe may leave unused unless that is confirmed


@dataclass(frozen=True)
class Plan:
    """A profile made concrete: a job for every row it keeps, in the table's order."""

    profile: str
    title: str
    stages: tuple[str, ...]  # beyond the built-in table's, as load_table reads them
    table: Table
    runtime: Runtime
    jobs: Mapping[str, Job[Any]]
    sources: Mapping[str, Mapping[str, str]]  # row -> role -> the row that fills it
    left_out: Mapping[str, str]  # row -> why
    rerun: frozenset[str]  # rows to make again although they are finished, with all that follows from them

    @property
    def base(self) -> str | None:
        """The row that trains a model from nothing, if the plan keeps it."""
        return next((row for row in self.jobs if self.table[row].trains), None)

    @property
    def report(self) -> str | None:
        """The row that leaves the report, if the plan keeps it."""
        return next((row for row in self.jobs if self.table[row].reports), None)

    def processes(self, row: str) -> int:
        """How many share a row's work, on all machines."""
        return self.runtime.processes if self.table[row].ranks == "all" else 1

    def planned(self, row: str) -> Planned:
        """What a recipe is asked its arithmetic with."""
        reads = {role: self.planned(source) for role, source in self.sources[row].items()}
        before = list(self.jobs)[: list(self.jobs).index(row)]
        config = self.jobs[row].config
        return Planned(row, config, reads, tuple(self.jobs[name].config for name in before))

    def facts(self, row: str) -> dict[str, float]:
        """What is known of a stage by arithmetic: params, tokens, flops, steps."""
        recipe: Recipe = self.jobs[row].config
        return recipe.facts(self.planned(row))


class Verdict(NamedTuple):
    """What would happen to a job, and why."""

    state: Literal["hit", "fetch", "resume", "run"]
    why: str
    step: int | None = None  # where a resumed stage goes on
    seconds: float | None = None  # what the finished artefact took


def profile_names() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load(
    profile: str,
    overrides: Sequence[str] = (),
    *,
    base_dir: Path,
    rerun: Iterable[str] = (),
    until: str | None = None,
) -> Plan:
    """Read a profile (a name, or a path to a .toml of your own), apply `stage.key=value` overrides, and bind
    every row. `profile.stages=[...]` adds stages to those that the profile names itself."""
    path = Path(profile) if profile.endswith(".toml") else PROFILES / f"{profile}.toml"
    data = _read_profile(profile, path)
    header = data.pop("profile", {})
    for override in overrides:
        _apply(data, override)
    more = data.pop("profile", {})
    for key in more:
        if key != "stages":
            raise UsageError(unknown("key of profile to set", key, ["stages"]))
    stages = (*_stages(header, path.parent), *_stages(more, Path()))
    table = load_table(stages)
    for name in data:
        if name != "runtime" and name not in table:
            raise UsageError(unknown("stage", name, [*table, "runtime"]))
    runtime = _validated(Runtime, "runtime", data.pop("runtime", {}) | {"base_dir": str(base_dir)})
    for asked in [*rerun, *([until] if until else [])]:
        if asked not in table:
            raise UsageError(unknown("stage", asked, list(table)))

    left_out = {name: f"profile {profile} leaves it out" for name in header.get("leave_out", [])}
    for name in left_out:
        if name not in table:
            raise UsageError(f"profile {profile}, leave_out: " + unknown("stage", name, list(table)))
    jobs: dict[str, Job[Any]] = {}
    sources: dict[str, dict[str, str]] = {}
    order = list(table)
    for stage in table.values():
        if until and order.index(stage.name) > order.index(until):
            left_out[stage.name] = f"after {until}"
        if stage.name in left_out:
            continue
        filled: dict[str, str] = {}
        for role, rows in stage.reads.items():
            candidates = (rows,) if isinstance(rows, str) else rows
            row = next((row for row in candidates if row in jobs), None)
            if row is None:
                left_out[stage.name] = f"it reads {' or '.join(candidates)}, which is left out"
                break
            filled[role] = row
        if stage.name in left_out:
            continue
        gathers = jobs if stage.gathers == "all" else stage.gathers
        filled |= {row: row for row in gathers if row in jobs}
        config = _validated(stage.module.Config, stage.name, data.get(stage.name, {}))
        name = fingerprint(stage, config, {role: jobs[row].fingerprint for role, row in filled.items()})
        inputs = {role: jobs[row].path for role, row in filled.items()}
        sources[stage.name] = filled
        read = {role: table[row] for role, row in filled.items()}
        place = runtime.base_dir / stage.name / name
        jobs[stage.name] = Job(stage.name, config, inputs, place, runtime, name, read)
    for asked in rerun:
        if asked not in jobs:
            raise UsageError(f"{asked} cannot be run again: {left_out[asked]}")
    plan = Plan(
        profile,
        header.get("title", profile),
        stages,
        table,
        runtime,
        jobs,
        sources,
        left_out,
        _with_descendants(set(rerun), sources),
    )
    for row, job in jobs.items():  # what cannot work is refused before anything runs
        plan.facts(row)
        if (
            job.path / "result.json"
        ).is_file():  # it worked; a file that it was made from may lie elsewhere now
            continue
        job.config.check(plan.planned(row), plan.processes(row))
    return plan


def explain(plan: Plan) -> dict[str, Verdict]:
    """What running the plan would do to each row, found out without running or hashing anything."""
    verdicts: dict[str, Verdict] = {}
    previous = latest_run(plan.runtime.base_dir, plan.profile)
    for name, job in plan.jobs.items():
        if name in plan.rerun:
            step = saved_step(rerun_path(job))
            verdicts[name] = Verdict("run" if step is None else "resume", "asked to run again", step)
            continue
        verdicts[name] = judge(plan, name, verdicts, previous)
    return verdicts


def judge(
    plan: Plan, name: str, upstream: Mapping[str, Verdict], previous: Mapping[str, str] | None = None
) -> Verdict:
    """One row's verdict, given those of the rows it reads."""
    job = plan.jobs[name]
    try:
        result = store.verify(job.path, plan.runtime.base_dir)
        if result is not None:
            changed = changed_input(result, job, plan.sources[name])
            if changed is None:
                return Verdict("hit", "done", seconds=result["seconds"])
            why = f"{changed} was made again and differs"
        else:
            why = ""
    except store.Damaged as damage:
        why = str(damage)
    step = saved_step(job.path)
    copies = mirror.of(plan.runtime)
    there = copies.look(job) if copies is not None else mirror.Found()
    if there.result is not None and changed_input(there.result, job, plan.sources[name]) is None:
        found = "finished in the mirror"
        return Verdict("fetch", f"{why}; {found}" if why else found, seconds=there.result["seconds"])
    aside = f"; {there.trouble}" if there.trouble else ""
    if there.step is not None and there.step > (-1 if step is None else step):
        return Verdict("resume", why or "its checkpoint is in the mirror", there.step)
    if step is not None:
        return Verdict("resume", (why or "was interrupted") + aside, step)
    if not why:
        why = why_new(plan, name, upstream, previous)
    return Verdict("run", why + aside)


def why_new(
    plan: Plan, name: str, upstream: Mapping[str, Verdict], previous: Mapping[str, str] | None
) -> str:
    """Why a job has no artefact: what differs from the last run's, or that it never ran."""
    job = plan.jobs[name]
    if previous is None or name not in previous:
        return "first run"
    old = read_job(plan.runtime.base_dir / name / previous[name])
    if old is None:
        return "its artefact is not there"
    differences = [
        f"{name}.{key}: {old['config'].get(key)!r} -> {value!r}"
        for key, value in job.config.model_dump(mode="json").items()
        if old["config"].get(key) != value
    ]
    stage = plan.table[name]
    if not differences and old["version"] != stage.version:
        differences = [f"{name} has a new version ({old['version']} -> {stage.version})"]
    if not differences and old.get("source", "") != stage.digest:
        differences = [f"{stage.file or 'its code'} has changed"]
    if not differences:
        changed = [
            row
            for role, row in plan.sources[name].items()
            if old["inputs"].get(role, {}).get("fingerprint") != plan.jobs[row].fingerprint
        ]
        if len(changed) == 1:
            differences = [f"its input {changed[0]} is another"]
        elif changed:
            differences = [f"its inputs {', '.join(changed)} are others"]
    return "; ".join(differences) or "its artefact is not there"


def changed_input(result: Mapping[str, Any], job: Job[Any], sources: Mapping[str, str]) -> str | None:
    """The row whose artefact is no longer the one this result was made from, if there is one."""
    for role, row in sources.items():
        try:
            now = store.read_result(job.inputs[role])
        except store.Damaged:
            continue  # it will be made again first; what comes of that decides
        if now is not None and store.content(now) != result["inputs"].get(role, {}).get("content"):
            return row
    return None


def rerun_path(job: Job[Any]) -> Path:
    """Where a finished job is made again: beside its artefact, which stays until the new one is complete."""
    return job.path.with_name(job.path.name + ".rerun")


def saved_step(directory: Path) -> int | None:
    """The step an unfinished training stage would go on from."""
    steps = [
        int(path.name.removeprefix("step_")) for path in (directory / "checkpoints").glob("step_????????")
    ]
    return max(steps, default=None)


def read_job(directory: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((directory / "job.json").read_text())
        return record if isinstance(record, dict) else None
    except (OSError, ValueError):
        return None


def by_other_code(plan: Plan, verdicts: Mapping[str, Verdict]) -> list[str]:
    """Finished rows whose artefact another state of this library made. That is worth a word, never a re-run
    by itself: when a stage's meaning changes, its `version` says so."""
    today = store.code_digest()
    records = {name: read_job(plan.jobs[name].path) for name in verdicts if verdicts[name].state == "hit"}
    return [
        name
        for name, record in records.items()
        if record is not None and record.get("provenance", {}).get("code") != today
    ]


# Runs: which artefacts belonged together.


def remember(plan: Plan) -> None:
    """Note the plan as the profile's latest run, and as the latest of all.

    Rows that only --until left out keep what they had: a short run does not hide a longer one's models.
    """
    previous = latest_run(plan.runtime.base_dir, plan.profile) or {}
    jobs = {row: name for row, name in previous.items() if plan.left_out.get(row, "").startswith("after ")}
    record = {
        "format": store.FORMAT,
        "profile": plan.profile,
        "stages": list(plan.stages),
        "jobs": {name: job.fingerprint for name, job in plan.jobs.items()} | jobs,
    }
    folder = plan.runtime.base_dir / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    store.write_json(folder / f"{_slug(plan.profile)}.json", record)
    store.write_json(folder / "latest.json", record)


def latest_run(base_dir: Path, profile: str | None = None) -> dict[str, str] | None:
    """Row -> fingerprint of the latest run (of a profile)."""
    record = _run_record(base_dir, profile)
    return dict(record["jobs"]) if record is not None else None


def latest_table(base_dir: Path, profile: str | None = None) -> Table:
    """The table that the latest run (of a profile) was planned with; the built-in one if there is none."""
    return load_table((_run_record(base_dir, profile) or {}).get("stages", []))


def latest_profile(base_dir: Path) -> str | None:
    """The profile of the latest run of all."""
    record = _run_record(base_dir, None)
    return str(record["profile"]) if record is not None else None


def _run_record(base_dir: Path, profile: str | None) -> dict[str, Any] | None:
    path = base_dir / "runs" / (f"{_slug(profile)}.json" if profile else "latest.json")
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"jobs", "profile"} <= set(record) else None


def needed(plan: Plan, name: str, verdicts: Mapping[str, Verdict]) -> list[str]:
    """The rows to run, in order, for one row's result: itself, and of what it reads all that is not there."""
    wanted: set[str] = set()
    for row in reversed(list(plan.jobs)):  # so that whoever reads a row has been asked before it
        asked = row == name or any(row in plan.sources[reader].values() for reader in wanted)
        if asked and verdicts[row].state != "hit":
            wanted.add(row)
    return [row for row in plan.jobs if row in wanted]


def wasted(plan: Plan, verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """Finished work of the profile's last run that this plan would leave unused, by stage, in seconds."""
    previous = latest_run(plan.runtime.base_dir, plan.profile) or {}
    lost: dict[str, float] = {}
    for name, old in previous.items():
        if name not in plan.jobs or (old == plan.jobs[name].fingerprint and name not in plan.rerun):
            continue
        if verdicts[name].state in ("hit", "fetch"):
            continue
        try:
            result = store.read_result(plan.runtime.base_dir / name / old)
        except ValueError:
            continue
        if result is not None:
            lost[name] = float(result["seconds"])
    return lost


def costly_reruns(plan: Plan, verdicts: Mapping[str, Verdict], stages: Collection[str]) -> list[str]:
    """What these stages of a plan would leave unused, a sentence each, if it is more than an hour of work."""
    lost = {name: seconds for name, seconds in wasted(plan, verdicts).items() if name in stages}
    if sum(lost.values()) <= COSTLY_SECONDS:
        return []
    return [
        f"{name} runs again: {verdicts[name].why}; {span(seconds)} of work stay in "
        f"{plan.runtime.base_dir / name} but are not used"
        for name, seconds in lost.items()
    ]


# Reading profiles and overrides.


def _read_profile(profile: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        if profile.endswith(".toml"):
            raise UsageError(f"there is no profile file {profile}") from None
        raise UsageError(unknown("profile", profile, profile_names())) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"profile {path} cannot be read: {error}") from None


def _stages(header: Mapping[str, Any], folder: Path) -> list[str]:
    named = header.get("stages", [])
    if not isinstance(named, list):
        raise UsageError(f'profile.stages = {named!r}: write a list, as in ["my_stage.py:name"]')
    return [located(source, folder) for source in named]


def _apply(data: dict[str, Any], override: str) -> None:
    """Put `stage.key=value` into a profile; the value is TOML, or else plain text."""
    target, equals, text = override.partition("=")
    keys = target.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise UsageError(f"--set {override}: write it as stage.key=value, for example pretrain.depth=4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = data
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {key} is a value, not a table")
    table[keys[-1]] = value


def _validated(model: type[M], where: str, fields: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UsageError(unknown(f"key of {where}", key, list(model.model_fields))) from None
        name = f"{where}.{key}" if key else where
        if first["type"] == "value_error":  # our own words
            raise UsageError(f"{name}: {first['ctx']['error']}") from None
        raise UsageError(f"{name} = {first['input']!r}: {first['msg']}") from None


def _with_descendants(rows: set[str], sources: Mapping[str, Mapping[str, str]]) -> frozenset[str]:
    for name, filled in sources.items():  # in the table's order, so one pass finds them all
        if rows.intersection(filled.values()):
            rows.add(name)
    return frozenset(rows)


def _slug(profile: str) -> str:
    return Path(profile).stem
