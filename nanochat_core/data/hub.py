"""The data sets that the shards stage knows by name."""

from typing import NamedTuple


class HubSet(NamedTuple):
    """Parquet shards on the Hugging Face hub, numbered from 0; the last one is for validation."""

    repo: str
    shards: int
    pattern: str = "shard_{:05d}.parquet"

    def url(self, index: int, revision: str) -> str:
        return f"https://huggingface.co/datasets/{self.repo}/resolve/{revision}/{self.pattern.format(index)}"


HUB = {
    "fineweb-edu-100b-shuffle": HubSet("karpathy/fineweb-edu-100b-shuffle", 1823),
    "climbmix-400b-shuffle": HubSet("karpathy/climbmix-400b-shuffle", 6543),
}
