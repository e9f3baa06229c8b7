"""The text to pretrain on, as parquet shards shared between runs; the artefact is their list, shards.json."""

from pathlib import Path

from pydantic import Field, model_validator

from nanochat_core.data.hub import HUB
from nanochat_core.stage import Job, Metrics, Recipe


class Config(Recipe):
    source: str | tuple[str, ...] = "embedded"  # or a known data set, a folder, parquet URLs
    count: int | None = Field(None, ge=1)  # train shards; the pinned validation shard always comes along
    revision: str = "main"  # of a known data set; a commit's hash pins it
    max_chars: int | None = Field(None, ge=10_000)  # of the embedded corpus; None: all 21 million
    workers: int = Field(4, ge=1, le=32)  # downloads at once

    @model_validator(mode="after")
    def _bounded(self) -> "Config":
        if self.source in HUB and self.count is None:
            raise ValueError(f"{self.source} has thousands of shards: set count")
        if self.max_chars is not None and self.source != "embedded":
            raise ValueError("max_chars belongs to the embedded corpus; limit other sources by count")
        return self


def run(cfg: Config, job: Job) -> Metrics:
    """Bring the shards and list them with sizes, hashes, rows and row groups."""
    from nanochat_core.data import shards
    from nanochat_core.data.documents import MANIFEST, Shards
    from nanochat_core.data.fetch import offline
    from nanochat_core.store import write_whole

    root = job.runtime.base_dir / "downloads"
    root.mkdir(parents=True, exist_ok=True)

    def progress(done: int, wanted: int) -> None:
        job.record(step=done, steps=wanted)

    if cfg.source == "embedded":
        found = shards.embedded(root, cfg.max_chars)
    elif isinstance(cfg.source, str) and cfg.source in HUB:
        urls = shards.hub_urls(cfg.source, cfg.count or 0, cfg.revision)
        folder = root / f"{cfg.source}-{cfg.revision}"
        found = shards.download(urls, folder, workers=cfg.workers, offline=offline(), progress=progress)
    elif isinstance(cfg.source, tuple) or cfg.source.startswith(("http://", "https://")):
        urls = [cfg.source] if isinstance(cfg.source, str) else list(cfg.source)
        folder = root / f"urls-{job.fingerprint}"
        found = shards.download(urls, folder, workers=cfg.workers, offline=offline(), progress=progress)
    else:
        found = shards.local(Path(cfg.source).expanduser(), root)
    found = Shards(found.train[: cfg.count], found.validation)
    write_whole(job.path / MANIFEST, shards.manifest(found, root))
    for shard in found.train + found.validation:
        if shard.path.is_relative_to(root):
            job.uses(shard.path)
    job.record(step=1, steps=1)
    return {
        "train_shards": len(found.train),
        "documents": sum(shard.rows for shard in found.train),
        "validation_documents": sum(shard.rows for shard in found.validation),
        "bytes": sum(shard.size for shard in found.train + found.validation),
    }
