"""The data sets that the shards stage knows by name, and which commit of one is meant."""

import functools
import json
import re
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from nanochat_core.artifacts.store import locked, write_json
from nanochat_core.sources.http import endpoint, head
from nanochat_core.sources.retry import Patience, insistently

COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT = 30.0


class HubSet(NamedTuple):
    """Parquet shards on the Hugging Face hub, numbered from 0; the last one is for validation."""

    repo: str
    shards: int
    commit: str | None = None  # what no revision means; another one here is a new version of the stage
    pattern: str = "shard_{:05d}.parquet"

    def url(self, index: int, revision: str) -> str:
        return f"{endpoint()}/datasets/{self.repo}/resolve/{revision}/{self.pattern.format(index)}"


HUB = {
    "fineweb-edu-100b-shuffle": HubSet("karpathy/fineweb-edu-100b-shuffle", 1823),
    "climbmix-400b-shuffle": HubSet(
        "karpathy/climbmix-400b-shuffle", 6543, "915333b4f8b8684f39aeaafea600fea6f43fb703"
    ),
}


def commit_of(known: HubSet, revision: str | None, root: Path, patience: Patience | None) -> str:
    """The commit to take all files of: the one that is named or known, or what a branch's name meant when it
    was first asked for. That is kept in `hub/` of the downloads, so that no later run mixes two.

    `patience` is for asking the hub; None: it is not to be asked.
    """
    name = revision or known.commit or "main"
    if COMMIT.fullmatch(name):
        return name
    kept = root / "hub" / f"{known.repo.replace('/', '--')}@{quote(name, safe='')}.lock.json"
    with locked(kept.with_name(f"{kept.name}.lock")):
        if kept.is_file():
            return str(json.loads(kept.read_text(encoding="utf-8"))["commit"])
        if patience is None:
            raise ValueError(
                f"NANOCHAT_OFFLINE is set and which commit of {known.repo} is meant by {name!r} was never "
                "asked for: run once with a network, or set shards_head.revision and shards.revision to the "
                "commit of the files that you bring"
            )
        url = known.url(known.shards - 1, name)
        commit = insistently(functools.partial(head, url, TIMEOUT), patience).get("X-Repo-Commit") or ""
        if not COMMIT.fullmatch(commit):
            raise ValueError(f"{url} names no commit: set shards_head.revision and shards.revision to one")
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(kept, {"revision": name, "commit": commit, "date": date})
        return commit
