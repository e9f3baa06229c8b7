"""What a stage is: a recipe, a directory whose name is the recipe's fingerprint, and a function between the
two."""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from nanochat_core.artifacts import store
from nanochat_core.artifacts.planned import Estimate, Planned, Speed

Metrics = dict[str, float | int | str | None]
"""What a stage reports: flat, and written as it is into result.json."""


class Interrupted(Exception):
    """The stage was told to stop and has saved what it had; running it again goes on from there."""


class Later:
    """Marks a key that recipes got after results had been made without it: at its default it is left out of a
    fingerprint, so theirs hold."""


class Recipe(BaseModel):
    """The base of every stage's Config: what decides the result. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def facts(self, stage: Planned) -> dict[str, float]:
        """What arithmetic says of this stage before it runs: params, steps, tokens, flops."""
        return {}

    def check(self, stage: Planned, ranks: int) -> None:
        """Refuse what could only fail later, given how many processes will share the work."""

    def estimate(self, stage: Planned, speed: Speed) -> Estimate | None:
        """How long the work takes on a machine of this speed; None if the recipe does not say."""
        return None


C = TypeVar("C", bound=Recipe, covariant=True)


class Runtime(BaseModel):
    """Where and how a run happens. Nothing here changes what the mathematics comes to, so none of it is
    identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_dir: Path = Path()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    nproc: int = Field(1, ge=1)  # processes of a training stage on each machine, one per GPU
    nnodes: int = Field(1, ge=1)  # machines; the others answer with `nanochat join` over the same base_dir
    rendezvous: str | None = Field(None, pattern=r"^[^:\s]+:\d+$")  # HOST:PORT of the first; its name if None
    environment: dict[str, str] = {}  # of a stage's processes, set before torch is loaded: NCCL's and others
    threads: int | None = Field(None, ge=1)  # of torch in each process; None: all cores, shared out
    # auto: bf16 where the hardware multiplies it fast. fp8: bf16, and the blocks' products in 8 bits while
    # training; worth it from depth 20 on. An older GPU than sm89 is refused, a CPU emulates it and says so.
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    compile: bool = True  # torch.compile for training; False is slower and starts at once
    # On CUDA: gradients without atomics, as a resumed run's bits want it. What that costs is unmeasured.
    deterministic: bool = True
    device_batch: dict[str, int] = {}  # rows of one forward pass, by stage; what does not fit is halved
    save_minutes: float = Field(10.0, gt=0)  # a training stage saves at least this often
    save_steps: int | None = Field(None, ge=1)  # and, if set, every so many steps
    preflight: bool = False  # `nanochat doctor` first; what it finds broken ends the run before any work
    silent_minutes: float = Field(240.0, ge=0)  # a stage that says nothing for so long is ended, as it hangs
    network_minutes: float = Field(45.0, ge=0)  # that a download may bring nothing before it is given up
    price_per_kwh: float | None = Field(None, ge=0)  # in your currency; the report reckons each stage's cost
    price_per_hour: float | None = Field(None, ge=0)  # of a rented machine
    keep_checkpoints: int = Field(2, ge=1)  # of an unfinished stage; a finished one keeps only its weights
    # Pairs of neighbouring checkpoints to keep for `nanochat audit`, evenly over a training stage; they stay
    # when it is finished. A pair is twice the size of a checkpoint.
    audit_stretches: int = Field(0, ge=0)
    stop_step: int | None = Field(None, ge=1)  # save there and end as if told to, as an audit's replay does
    mirror: str | None = None  # an fsspec URL that takes copies, from which another machine goes on

    @property
    def processes(self) -> int:
        """Of a training stage, on all machines."""
        return self.nproc * self.nnodes


@dataclass(frozen=True)
class Job(Generic[C]):
    """A stage bound to a recipe, to the finished directories it reads and to its own."""

    stage: str
    config: C
    inputs: Mapping[str, Path]
    path: Path
    runtime: Runtime
    fingerprint: str
    rows: Mapping[str, "Stage"] = field(default_factory=dict, compare=False)  # of the table, by role
    shared: set[Path] = field(default_factory=set, compare=False)
    origins: dict[str, Any] = field(default_factory=dict, compare=False)

    def record(self, *, step: int, steps: int, **row: float | int | str) -> None:
        """One line of progress, for whoever watches: step of steps, and any numbers worth a curve."""
        line = json.dumps({"step": step, "steps": steps, **row, "time": round(time.time(), 3)})
        with (self.path / "metrics.jsonl").open("a") as f:
            f.write(line + "\n")

    def arrived(self, files: int, wanted: int, waiting: str = "") -> None:
        """One line of progress of a download: files that are here, and what is waited for if so."""
        self.record(step=files, steps=wanted, **({"waiting": waiting} if waiting else {}))

    def uses(self, path: Path) -> None:
        """Say that the artefact relies on a shared file outside its directory; it is verified along with the
        rest."""
        self.shared.add(path)

    def made_from(self, place: Path, suffixes: Sequence[str] = ("",)) -> None:
        """Say that the artefact comes from a user's own file, or a folder's files that end so: when they
        change, it is made again. To be said before they are read."""
        self.origins[str(place.absolute())] = store.origin(place.absolute(), suffixes)


class StageModule(Protocol):
    """What a file in stages/ offers: its Config and its run."""

    @property
    def Config(self) -> type[Recipe]: ...

    def run(self, cfg: Any, job: Job[Any]) -> Metrics: ...


@dataclass(frozen=True)
class Stage:
    """A row of the table. `reads` names, for each role, the rows that can fill it: the first one the profile
    keeps does.

    `gathers` lists rows that are read if the profile keeps them and are not missed otherwise. `version` is
    raised when the code's meaning changes, so that artefacts made before are made again. A stage that
    `trains` leaves a model that `chat` opens; the report puts its numbers, and those of the stages that
    `measure` the model, under the name given here: `sft/val_bpb`, `sft/chatcore`.
    """

    name: str
    module: StageModule
    reads: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    gathers: tuple[str, ...] | Literal["all"] = ()  # all: every row before it
    ranks: Literal["one", "all"] = "one"
    device: bool = False  # wants the accelerator to itself
    version: int = 1
    optional: bool = False  # only in the profiles that switch it on
    trains: str = ""
    measures: str = ""
    shows: tuple[str, ...] = ()  # metrics that the report puts there; none named: its choice
    reports: bool = False  # leaves report.md and report.html
    file: Path | None = None  # of a user, and the digest of its source
    digest: str = ""


def canonical(value: Any, where: str = "recipe") -> Any:
    """The value as plain JSON data, or an error: anything without one stable spelling would fork fingerprints
    silently."""
    if isinstance(value, BaseModel):
        value = {
            name: getattr(value, name)
            for name, key in type(value).model_fields.items()
            if Later not in key.metadata or getattr(value, name) != key.default
        }
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; a recipe holds finite numbers only")
        return value
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise ValueError(f"{where} has keys that are not text; a recipe's keys are names")
        return {key: canonical(value[key], f"{where}.{key}") for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [canonical(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{where} is a {type(value).__name__}, which has no stable form to take a fingerprint of"
    )


def fingerprint(stage: Stage, config: Recipe, inputs: Mapping[str, str]) -> str:
    """The identity of a result: stage, version, recipe and the identities of what it reads; of a user's stage
    also its source. 20 hex digits."""
    identity = {
        "stage": stage.name,
        "version": stage.version,
        "config": canonical(config, stage.name),
        "inputs": dict(inputs),
    } | ({"source": stage.digest} if stage.digest else {})
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
