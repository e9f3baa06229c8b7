"""Checkpoints of an unfinished stage: whole, hashed, newest first, a damaged one given up for the one before.

`checkpoints/step_00001200/` holds model.safetensors, one rank_<r>.safetensors and rank_<r>.json (optimizer
part and place in the data) per rank, and manifest.json, written last, with everything's size and hash. The
folder gets its name by rename once it is complete. Weights are copied when `save` is called and written by a
thread while training goes on.
"""

import json
import os
import re
import shutil
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_core.artifacts import store, transcript
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT
from nanochat_core.optim.optimizer import Optimizer

RANK_FILES_SECONDS = 600.0  # how long the first rank waits for the others' files


@dataclass
class TrainState:
    """Everything that training changes. There is no random state: every random number comes from a seed and a
    step."""

    model: GPT
    optimizer: Optimizer
    cursor: dict[str, Any]  # this rank's place in the data
    step: int = 0
    drawn: int = 0  # batches taken from the data: steps, and those that were passed over
    skip: list[int] = field(default_factory=list)  # batches to pass over, by their number, after Faults
    recent: list[tuple[float, float]] = field(default_factory=list)  # losses and norms, to know spikes by


class Fault(Exception):
    """A loss, a validation or a tensor of the state that cannot be trusted, found after taking in `batch`."""

    def __init__(self, what: str, batch: int) -> None:
        super().__init__(what)
        self.batch = batch


class Saver:
    """Writes checkpoints of one stage and finds the newest good one."""

    def __init__(
        self,
        directory: Path,
        world: World,
        keep: int,
        *,
        precision: str = "fp32",
        audits: int = 0,  # pairs to keep beside, evenly over so many steps:
        steps: int = 1,
    ) -> None:
        self.directory = directory / "checkpoints"
        self.world, self.keep = world, keep
        self.precision, self.audits, self.steps = precision, audits, steps
        self._at: int | None = None  # the step on disk, or on its way there, that the state last stood at
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._alone = threading.Event()

    def save(self, state: TrainState) -> None:
        """Copy the state now and write it in the background; the one before is waited for. Raises a Fault
        instead if the state cannot be trusted."""
        self.wait()
        if state.step == self._at:  # not asked of the disk: all ranks must give the same answer
            return
        self.inspect(state)
        self._at = state.step
        name = f"step_{state.step:08d}"
        # Clones: the thread must not see what the next step makes of them.
        model = (
            {k: v.detach().cpu().clone() for k, v in state.model.state_dict().items()}
            if self.world.is_first
            else {}
        )
        optimizer = {k: v.detach().cpu().clone() for k, v in state.optimizer.state_dict().items()}
        record = {
            "step": state.step,
            "drawn": state.drawn,
            "skip": list(state.skip),
            "recent": list(state.recent),
            "optimizer_steps": state.optimizer.step_count,
            "cursor": state.cursor,
            "ranks": self.world.size,
        }

        def write() -> None:
            try:
                self._write(name, model, optimizer, record)
            except BaseException as error:  # handed to the training thread by wait()
                self._failure = error

        self._writing = threading.Thread(target=write, name="checkpoint")
        self._writing.start()

    def inspect(self, state: TrainState) -> None:
        """Raise a Fault on all ranks if a tensor on any of them has changed in memory or is not finite."""
        sealed = state.optimizer.seals.on
        broken = [f"{name} changed in memory" for name in state.optimizer.seals.broken()]
        if sealed:
            state.optimizer.seals.take()
        found = state.model.state_dict() | state.optimizer.state_dict()
        broken += [f"{name} is not finite" for name in not_finite(found)]
        self.refuse(broken, state.step, state.drawn - 1)

    def refuse(self, broken: list[str], step: int, batch: int) -> None:
        """Raise a Fault on all ranks that names what is broken on any of them."""
        if self.world.any(bool(broken)):
            names = ", ".join(dict.fromkeys(self.world.gather(broken)))
            raise Fault(f"at step {step} {names}", batch)

    def wait(self) -> None:
        """Until the checkpoint being written is on disk; its error, if it failed, is raised here."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(
        self, name: str, model: dict[str, Tensor], optimizer: dict[str, Tensor], record: dict[str, Any]
    ) -> None:
        part = self.directory / f"{name}.part"
        rank, first = self.world.rank, self.world.is_first
        part.mkdir(parents=True, exist_ok=True)
        try:
            if first:
                write_tensors(part / "model.safetensors", model)
            write_tensors(part / f"rank_{rank}.safetensors", optimizer)
            # The last thing a rank does in this folder: once all are there, the first renames it.
            store.write_json(part / f"rank_{rank}.json", record, sync=False)
            if not first:
                return
            files = ["model.safetensors"]
            files += [f"rank_{r}.{kind}" for r in range(self.world.size) for kind in ("safetensors", "json")]
            if not self._await_ranks(part):
                return
            listed = {f: store.entry(part / f) for f in files}
            store.write_json(part / "manifest.json", {"format": store.FORMAT, "files": listed})
            facts = {key: record[key] for key in ("step", "drawn", "skip", "ranks")}
            facts |= transcript.hashes(listed)
            facts |= {"precision": self.precision, "code": store.code_digest()}
            facts |= {"host": socket.gethostname(), "time": round(time.time(), 3)}
            transcript.append(self.directory.parent, facts)
            part.replace(self.directory / name)
            store.sync_directory(self.directory)
        except OSError:
            if first:  # a full disk must not stay full of what cannot be finished
                shutil.rmtree(part, ignore_errors=True)
            raise
        for old in reversed(self.found()[self.keep :]):
            self._retire(old)

    def _retire(self, folder: Path) -> None:
        """Delete a checkpoint, or keep it for audits: each part of the run keeps its first two."""
        audits = self.directory.with_name(store.AUDITS)

        def part(one: Path) -> int:
            return step_of(one) * self.audits // self.steps

        if self.audits and sum(part(one) == part(folder) for one in audits.glob("step_*")) < 2:
            audits.mkdir(exist_ok=True)
            folder.replace(audits / folder.name)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def give_up(self) -> None:
        """Wait for no other rank's part any more: after an error here they may be gone."""
        self._alone.set()

    def _await_ranks(self, part: Path) -> bool:
        """Whether all ranks have written their parts."""
        deadline = time.monotonic() + RANK_FILES_SECONDS
        for r in range(self.world.size):
            while not (part / f"rank_{r}.json").exists():
                if self._alone.is_set():
                    return False
                if time.monotonic() > deadline:
                    raise ValueError(f"rank {r} did not write its part of {part.name}")
                time.sleep(0.05)
        return True

    def found(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        return sorted(self.directory.glob("step_????????"), reverse=True)

    def resume(self, state: TrainState) -> bool:
        """Bring the state to the newest checkpoint that is as it was written; False if there is none.

        Damaged ones that are newer lose their names, or they would stand in the way of what is saved next.
        """
        if self.world.is_first and self.directory.exists():
            for part in self.directory.glob("*.part"):
                shutil.rmtree(part, ignore_errors=True)
        newest = self._newest_good() if self.world.is_first else 0
        step = int(self.world.sum(newest)[0])  # one rank decides: on a network's disk the others may see less
        if step < 0:
            return False
        self._load(self.directory / f"step_{step:08d}", state)
        self._at = step
        return True

    def _newest_good(self) -> int:
        """The step of the newest checkpoint that is as it was written, or -1. A damaged one costs minutes if
        another is whole, and is deleted; if none is, they hold all there was, and are kept under another
        name."""
        aside: list[Path] = []
        for folder in self.found():
            reason = damage(folder)
            if reason is None:
                for damaged in aside:
                    shutil.rmtree(damaged, ignore_errors=True)
                return step_of(folder)
            print(f"checkpoint {folder.name} is damaged ({reason}); going back to the one before", flush=True)
            aside.append(folder.with_name(f"{folder.name}.damaged"))
            shutil.rmtree(aside[-1], ignore_errors=True)
            folder.replace(aside[-1])
        if aside:
            print(f"no checkpoint is whole; they stay in {self.directory} as *.damaged", flush=True)
        return -1

    def discard(self, step: int) -> None:
        """Delete the checkpoints from `step` on, so that an older one is resumed; none if no older one is
        whole."""
        if not self.world.is_first:
            return
        suspect = [folder for folder in self.found() if step_of(folder) >= step]
        if any(damage(folder) is None for folder in self.found()[len(suspect) :]):
            for folder in suspect:
                print(f"deleting checkpoint {folder.name}: what follows it fails twice", flush=True)
                shutil.rmtree(folder)

    def _load(self, folder: Path, state: TrainState) -> None:
        """What other ranks saved is divided anew if their number was another."""
        saved = json.loads((folder / "rank_0.json").read_text())["ranks"]
        records = [json.loads((folder / f"rank_{r}.json").read_text()) for r in range(saved)]
        try:
            weights = load_file(folder / "model.safetensors")
            with torch.no_grad():
                for name, tensor in state.model.state_dict().items():
                    tensor.copy_(weights[name])
        except (KeyError, RuntimeError):
            raise ValueError(f"{folder} holds a model of another shape than this stage's recipe") from None
        parts = [safe_open(folder / f"rank_{r}.safetensors", "pt") for r in range(saved)]
        record = records[self.world.rank % saved]
        state.optimizer.load_state_dict([part.get_tensor for part in parts], record["optimizer_steps"])
        state.step, state.drawn, state.cursor = record["step"], record["drawn"], record["cursor"]
        state.recent = record.get("recent", [])  # not in a checkpoint from before there was such an option
        if saved != self.world.size:
            if self.world.is_first:
                print(f"{folder.name} was saved by {saved} ranks and is divided among {self.world.size}")
            state.cursor = {"ranks": [record["cursor"] for record in records]}
        state.skip = sorted(set(record["skip"]) | set(state.skip))


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


@torch.no_grad()
def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinity: their sums do too, and take one pass to read."""
    finite = torch.stack([tensor.sum() for tensor in tensors.values()]).isfinite().tolist()
    return [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "its manifest cannot be read"
    for name, want in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != want["size"]:
            return f"{name} is not whole"
        try:
            if store.sha256(path) != want["sha256"]:
                return f"{name} has changed"
        except OSError as error:  # a disk that cannot read what it holds
            return f"{name}: {error.strerror}"
    return None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, on the disk and not only in its cache when this returns."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it tells the system's error in its text alone
        if match := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
        raise
    with path.open("rb") as f:
        os.fsync(f.fileno())


def save_model(directory: Path, model: GPT) -> None:
    """The weights of a finished stage, whole or not at all."""
    path = directory / "model.safetensors"
    part = path.with_name(path.name + ".part")
    write_tensors(part, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()})
    part.replace(path)
