"""The text to pretrain on, as parquet shards shared between runs; the artefact is their list, shards.json."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from nanochat_core.artifacts.planned import Planned
from nanochat_core.artifacts.stage import Job, Metrics, Recipe
from nanochat_core.sources.hub import HUB

if TYPE_CHECKING:
    from nanochat_core.sources.http import Remote
    from nanochat_core.sources.retry import Tell, Wait

SHARD_BYTES = 100e6  # of 250 million characters as zstd parquet


class Config(Recipe):
    source: str | tuple[str, ...] = "embedded"  # or a known data set, a folder, any fsspec URL, parquet URLs
    count: int | None = Field(None, ge=1)  # train shards; the pinned validation shard always comes along
    # Of a known data set: a commit, or a branch. None: the commit that data/hub.py knows, or else main.
    # A branch's commit is asked for once and kept in base_dir/downloads/hub.
    revision: str | None = Field(None, min_length=1)
    max_chars: int | None = Field(None, ge=10_000)  # of the embedded corpus; None: all 21 million
    workers: int = Field(4, ge=1, le=32)  # downloads at once

    @field_validator("source")
    @classmethod
    def _absolute(cls, source: str | tuple[str, ...]) -> str | tuple[str, ...]:
        """A folder is named in full: a stage, or a worker, may run elsewhere than this command."""
        if isinstance(source, tuple) or source in ("", "embedded", *HUB) or "://" in source:
            return source
        return str(Path(source).expanduser().absolute())

    @model_validator(mode="after")
    def _bounded(self) -> "Config":
        if self.source in HUB and self.count is None:
            raise ValueError(f"{self.source} has thousands of shards: set count")
        if isinstance(self.source, tuple) and not all("://" in url for url in self.source):
            raise ValueError("a list of sources is a list of URLs; of local folders name one")
        if self.source in ((), ""):
            raise ValueError("source is empty")
        if self.revision is not None and self.source not in HUB:
            raise ValueError("revision belongs to a known data set; in a URL write /resolve/REVISION/")
        if self.max_chars is not None and self.source != "embedded":
            raise ValueError("max_chars belongs to the embedded corpus; limit other sources by count")
        return self

    def facts(self, stage: Planned) -> dict[str, float]:
        """What is to be downloaded; the shards that an earlier row has brought are there already."""
        if self.source not in HUB:
            return {}
        same = [one for one in stage.before if isinstance(one, Config) and one.source == self.source]
        known = max(((one.count or 0) + 1 for one in same), default=0)
        return {"download": SHARD_BYTES * max(0, (self.count or 0) + 1 - known)}


def files(cfg: Config, root: Path, patience: float, wait: "Wait", tell: "Tell") -> "list[Remote]":
    """What to download to `root`, the validation file last; nothing for a local source. It may have to ask
    the hub which commit is meant."""
    from nanochat_core.sources.download import offline
    from nanochat_core.sources.http import endpoint
    from nanochat_core.sources.hub import commit_of
    from nanochat_core.sources.retry import Patience
    from nanochat_core.sources.shard_sets import hub_files, remotes

    if isinstance(cfg.source, str) and cfg.source in HUB:
        left = None if offline() else Patience(endpoint(), patience, wait, tell)
        commit = commit_of(HUB[cfg.source], cfg.revision, root, left)
        return hub_files(cfg.source, cfg.count or 0, commit, root)
    listed = (cfg.source,) if isinstance(cfg.source, str) else cfg.source
    if not all(url.startswith(("http://", "https://")) for url in listed):
        return []
    return remotes([*listed[:-1][: cfg.count], listed[-1]], root)


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Bring the shards and list them with sizes, hashes, rows and row groups."""
    import time

    from nanochat_core.artifacts.store import write_whole
    from nanochat_core.sources import corpus, shard_sets
    from nanochat_core.sources.documents import MANIFEST, Shards
    from nanochat_core.sources.download import offline
    from nanochat_core.sources.raw_text import PACKED, SUFFIXES

    root = job.runtime.base_dir / "downloads"
    root.mkdir(parents=True, exist_ok=True)
    patience = 60 * job.runtime.network_minutes
    commit = None

    if cfg.source == "embedded":
        for sentence in corpus.missing():
            job.record(step=0, steps=1, note=sentence)
        found = shard_sets.embedded(root, cfg.max_chars)
    elif listed := files(cfg, root, patience, time.sleep, lambda waiting: job.arrived(0, 1, waiting)):
        found = shard_sets.download(
            listed,
            root,
            workers=cfg.workers,
            offline=offline(),
            patience=patience,
            progress=job.arrived,
        )
        commit = shard_sets.revision(listed) or listed[0].commit
    elif isinstance(cfg.source, tuple) or "://" in cfg.source:
        places = (cfg.source,) if isinstance(cfg.source, str) else cfg.source
        found = shard_sets.from_filesystem(places, root, cfg.count, workers=cfg.workers, offline=offline())
    else:
        folder = Path(cfg.source)
        job.made_from(folder, SUFFIXES + PACKED)
        found = shard_sets.local(folder, root)
    found = Shards(found.train[: cfg.count], found.validation)
    write_whole(job.path / MANIFEST, shard_sets.manifest(found, root, commit))
    for shard in found.train + found.validation:
        if shard.path.is_relative_to(root):
            job.uses(shard.path)
    job.record(step=1, steps=1)
    return {
        "revision": commit,
        "train_shards": len(found.train),
        "documents": sum(shard.rows for shard in found.train),
        "validation_documents": sum(shard.rows for shard in found.validation),
        "bytes": sum(shard.size for shard in found.train + found.validation),
    }
