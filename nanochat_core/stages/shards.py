"""The text to pretrain on, as parquet shards shared between runs; the artefact is their list, shards.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from nanochat_core.data.hub import HUB
from nanochat_core.stage import Job, Metrics, Recipe

SHARD_BYTES = 100e6  # of 250 million characters as zstd parquet


class Config(Recipe):
    source: str | tuple[str, ...] = "embedded"  # or a known data set, a folder, any fsspec URL, parquet URLs
    count: int | None = Field(None, ge=1)  # train shards; the pinned validation shard always comes along
    revision: str = "main"  # of a known data set; a commit's hash pins it
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
        if self.max_chars is not None and self.source != "embedded":
            raise ValueError("max_chars belongs to the embedded corpus; limit other sources by count")
        return self

    def facts(self, configs: Mapping[str, Any]) -> dict[str, float]:
        """What is to be downloaded; the shards that the tokenizer's row has brought are there already."""
        if self.source not in HUB:
            return {}
        head = configs.get("shards_head")
        known = head.count + 1 if head is not None and head is not self and head.source == self.source else 0
        return {"download": SHARD_BYTES * max(0, (self.count or 0) + 1 - known)}


def urls(cfg: Config) -> list[str]:
    """The files to download, the validation file last; none for a local source."""
    from nanochat_core.data.shards import hub_urls

    if isinstance(cfg.source, str) and cfg.source in HUB:
        return hub_urls(cfg.source, cfg.count or 0, cfg.revision)
    listed = (cfg.source,) if isinstance(cfg.source, str) else cfg.source
    if not all(url.startswith(("http://", "https://")) for url in listed):
        return []
    return [*listed[:-1][: cfg.count], listed[-1]]


def run(cfg: Config, job: Job) -> Metrics:
    """Bring the shards and list them with sizes, hashes, rows and row groups."""
    from nanochat_core.data import corpus, shards
    from nanochat_core.data.documents import MANIFEST, Shards
    from nanochat_core.data.fetch import offline
    from nanochat_core.data.raw_text import PACKED, SUFFIXES
    from nanochat_core.store import write_whole

    root = job.runtime.base_dir / "downloads"
    root.mkdir(parents=True, exist_ok=True)

    if cfg.source == "embedded":
        for sentence in corpus.missing():
            job.record(step=0, steps=1, note=sentence)
        found = shards.embedded(root, cfg.max_chars)
    elif listed := urls(cfg):
        found = shards.download(
            listed,
            root,
            workers=cfg.workers,
            offline=offline(),
            progress=lambda n, of: job.record(step=n, steps=of),
        )
    elif isinstance(cfg.source, tuple) or "://" in cfg.source:
        places = (cfg.source,) if isinstance(cfg.source, str) else cfg.source
        found = shards.from_filesystem(places, root, cfg.count, workers=cfg.workers, offline=offline())
    else:
        folder = Path(cfg.source)
        job.made_from(folder, SUFFIXES + PACKED)
        found = shards.local(folder, root)
    found = Shards(found.train[: cfg.count], found.validation)
    write_whole(job.path / MANIFEST, shards.manifest(found, root))
    for shard in found.train + found.validation:
        if shard.path.is_relative_to(root):
            job.uses(shard.path)
    job.record(step=1, steps=1)
    commits = shards.revisions(found)
    if len(commits) > 1:
        note = f"the shards are of {len(commits)} commits of the data set; shards.revision pins one"
        job.record(step=1, steps=1, note=note)
    return {
        "revision": ", ".join(commits) or None,
        "train_shards": len(found.train),
        "documents": sum(shard.rows for shard in found.train),
        "validation_documents": sum(shard.rows for shard in found.validation),
        "bytes": sum(shard.size for shard in found.train + found.validation),
    }
