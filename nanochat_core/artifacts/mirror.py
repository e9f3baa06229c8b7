"""A second home for artefacts and checkpoints at any fsspec URL, from which another machine goes on.

`<url>/<stage>/<fingerprint>/` holds what the job's directory here holds, files first and result.json last;
`checkpoints/step_<n>.json` lists an unfinished stage's checkpoint and is written after its files. What has no
list is not there; what has one is checked against its hashes on the way back, so half an upload, or a damaged
one, is never believed.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Job, Runtime

AWAY_SECONDS = 60.0  # a mirror that did not answer is not asked again for so long
KEEP = 2  # checkpoints of an unfinished stage
RECORDS = ("job.json", "attempts.jsonl", "machine.jsonl", "metrics.jsonl", "transcript.jsonl", "log.txt")
# Of the s3 driver, unless fsspec's own configuration says otherwise: an address that does not answer is known
# after seconds, not minutes.
IMPATIENT = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 1}}}


class Found(NamedTuple):
    """What the mirror holds of a job, and why that may not be all."""

    result: dict[str, Any] | None = None
    step: int | None = None
    trouble: str | None = None


def of(runtime: Runtime) -> "Mirror | None":
    """The mirror that the profile, or else the environment, names."""
    url = runtime.mirror or os.environ.get("NANOCHAT_MIRROR")
    return opened(url) if url else None


@functools.cache
def opened(url: str) -> "Mirror":
    return Mirror(url)


class Mirror:
    """One URL and what can be done there. Everything but `look` may fail as networks do."""

    def __init__(self, url: str) -> None:
        import fsspec  # type: ignore[import-untyped]

        self.url, self._away_until = url, 0.0
        self.trouble: str | None = None
        protocol = url.partition("://")[0] if "://" in url else ""
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if protocol == "s3":
            options |= IMPATIENT | fsspec.config.conf.get("s3", {})
        try:
            if not protocol:
                raise ValueError("it has no protocol")
            self.fs, self.root = fsspec.url_to_fs(url, **options)
        except ImportError as error:
            raise ValueError(f"the mirror {url} needs a driver that is not installed ({error})") from None
        except ValueError as error:
            raise ValueError(
                f"{url} cannot be a mirror ({error}); write it as file:///dir or s3://bucket/prefix"
            ) from None

    def look(self, job: Job[Any]) -> Found:
        """What is there for a job; a mirror that does not answer holds nothing for a while, and says why."""
        if time.monotonic() < self._away_until:
            return Found(trouble=self.trouble)
        try:
            return Found(self._json(job, "result.json"), max(self._steps(job), default=None))
        except Exception as error:  # each driver has exceptions of its own for a network that is away
            self.trouble = f"the mirror {self.url} does not answer: {reason(error)}"
            self._away_until = time.monotonic() + AWAY_SECONDS
            return Found(trouble=self.trouble)

    # To the mirror.

    def push(self, job: Job[Any]) -> bool:
        """Copy a finished artefact with the shared files it relies on; False if it is there already (or a
        later one is)."""
        base_dir = job.runtime.base_dir
        here = (job.path / "result.json").read_bytes()
        result = store.verify(job.path, base_dir, hashes=True)
        assert result is not None
        there = self._json(job, "result.json")
        if there is not None and (there == result or there["finished"] > result["finished"]):
            return False
        self._remove(self._at(job, "result.json"))  # what it lists is about to change
        for name in result["files"]:
            self._put(job.path / name, self._at(job, name))
        for name, want in result.get("shared", {}).items():
            if self._size(f"{self.root}/{name}") != want["size"]:
                self._put(base_dir / name, f"{self.root}/{name}")
        for name in RECORDS:
            if name not in result["files"] and (job.path / name).exists():
                self._put(job.path / name, self._at(job, name))
        self._write(self._at(job, "result.json"), here)
        self._remove(self._at(job, "checkpoints"))
        return True

    def push_checkpoint(self, job: Job[Any], folder: Path) -> bool:
        """Copy a whole checkpoint, and the records that a resumed stage reads; False if it is there."""
        step = step_of(folder)
        if step in self._steps(job):
            return False
        staged = job.runtime.base_dir / "mirror" / f"{job.stage}-{job.fingerprint}-{folder.name}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            for path in folder.iterdir():  # links: training may delete its own names while we copy
                os.link(path, staged / path.name)
            listed = dict(json.loads((staged / "manifest.json").read_text())["files"])
            listed["manifest.json"] = store.entry(staged / "manifest.json")
            for name in RECORDS[:-1]:
                if (job.path / name).exists():
                    shutil.copyfile(job.path / name, staged / name)
                    listed[name] = store.entry(staged / name)
            for name in listed:
                self._put(staged / name, self._at(job, f"checkpoints/{folder.name}/{name}"))
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        record = json.dumps({"format": store.FORMAT, "files": listed}).encode()
        self._write(self._at(job, f"checkpoints/{folder.name}.json"), record)
        for old in sorted(self._steps(job), reverse=True)[KEEP:]:
            self._remove(self._at(job, f"checkpoints/step_{old:08d}.json"))
            self._remove(self._at(job, f"checkpoints/step_{old:08d}"))
        return True

    # From the mirror.

    def fetch(self, job: Job[Any], result: Mapping[str, Any]) -> None:
        """Bring a finished artefact: checked file by file beside its place, then put there by rename."""
        base_dir = job.runtime.base_dir
        part = job.path.with_name(job.path.name + ".part")  # a broken-off attempt's good files are kept
        part.mkdir(parents=True, exist_ok=True)
        for name, want in result["files"].items():
            self._get(self._at(job, name), inside(part, name), want)
        for name, want in result.get("shared", {}).items():
            self._get(f"{self.root}/{name}", inside(base_dir, name), want)
        for name in RECORDS:
            if name not in result["files"] and self.fs.exists(self._at(job, name)):
                store.write_whole(part / name, self.fs.cat_file(self._at(job, name)))
        store.write_json(part / "result.json", result)
        old = job.path.with_name(job.path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if job.path.exists():
            job.path.replace(old)
        part.replace(job.path)
        store.sync_directory(job.path.parent)
        shutil.rmtree(old, ignore_errors=True)

    def fetch_checkpoint(self, job: Job[Any], step: int, inputs: Mapping[str, str]) -> bool:
        """Bring a checkpoint and its records; False if it was made from other inputs than these (role ->
        content)."""
        name = f"step_{step:08d}"
        record = self._json(job, f"checkpoints/{name}.json")
        if record is None:
            return False
        part = job.path / "checkpoints" / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for file, want in record["files"].items():
            self._get(self._at(job, f"checkpoints/{name}/{file}"), inside(part, file), want)
        made_from = json.loads((part / "job.json").read_text())["inputs"]
        if {role: source["content"] for role, source in made_from.items()} != inputs:
            shutil.rmtree(part)
            return False
        for file in RECORDS:
            if (part / file).exists():  # before the checkpoint has its name: it never stands without its rows
                (part / file).replace(job.path / file)
        part.replace(part.with_name(name))
        store.sync_directory(part.parent)
        return True

    # What a file system does.

    def _at(self, job: Job[Any], name: str) -> str:
        return f"{self.root}/{job.stage}/{job.fingerprint}/{name}"

    def _json(self, job: Job[Any], name: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self.fs.cat_file(self._at(job, name)))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
            return None  # not there, or cut off by a power cut at the other end: files come before their list
        known = isinstance(found, dict) and "files" in found and found.get("format", 0) <= store.FORMAT
        return found if known and found.get("seal", store.seal(found)) == store.seal(found) else None

    def _steps(self, job: Job[Any]) -> list[int]:
        try:
            names = self.fs.ls(self._at(job, "checkpoints"), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [step_of(Path(name)) for name in names if name.endswith(".json")]

    def _size(self, path: str) -> int | None:
        try:
            return int(self.fs.info(path)["size"])
        except FileNotFoundError:
            return None

    def _put(self, local: Path, remote: str) -> None:
        self.fs.makedirs(remote.rpartition("/")[0], exist_ok=True)
        self.fs.put_file(str(local), remote)

    def _write(self, remote: str, data: bytes) -> None:
        self.fs.makedirs(remote.rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(remote, data)

    def _get(self, remote: str, local: Path, want: Mapping[str, Any]) -> None:
        """Bring one file, unless it is here; one that is not what its list says is Damaged."""
        if local.is_file() and store.entry(local) == want:
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        part = local.with_name(local.name + ".part")
        try:
            self.fs.get_file(remote, str(part))
        except FileNotFoundError:
            raise store.Damaged(f"the mirror's {remote} is missing") from None
        if store.entry(part) != want:
            part.unlink()
            raise store.Damaged(f"the mirror's {remote} is not what its list says")
        with part.open("rb") as f:
            os.fsync(f.fileno())
        part.replace(local)

    def _remove(self, remote: str) -> None:
        if self.fs.exists(remote):
            self.fs.rm(remote, recursive=True)


def inside(root: Path, name: str) -> Path:
    """Where a listed file goes; a list that leads out of the folder is not ours."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise store.Damaged(f"the mirror lists {name}, which leads out of {root}")
    return path


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_").removesuffix(".json"))


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
