"""What evaluations and tasks read besides text: the CORE bundle, identity conversations, a word list.

Everything is here, whole and checked, before any training begins.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from nanochat_core.artifacts.planned import Planned
from nanochat_core.artifacts.stage import Job, Metrics, Recipe

if TYPE_CHECKING:
    from nanochat_core.data.tasks import Split

BUNDLE = "eval_bundle"
IDENTITY = "identity_conversations.jsonl"
WORDS = "words_alpha.txt"
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # 162 MB
WORDS_URL = (
    "https://raw.githubusercontent.com/dwyl/english-words/20f5cc9b3f0ccc8ce45d814c532b7c2031bba31c/"
    "words_alpha.txt"
)
# Where several public files that use it agree; the identity conversations have none, and may change.
PINNED = {BUNDLE_URL: "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"}
CHECKED_ROWS = 5000  # of each task, evenly spaced
HUB_BYTES = 3e9  # CORE's bundle with its zip, SmolTalk as Arrow, the small ones: rounded up


class Config(Recipe):
    source: Literal["embedded", "hub"] = "embedded"
    bundle_url: str = BUNDLE_URL
    identity_url: str = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
    words_url: str = WORDS_URL
    tasks: tuple[str, ...] = (
        "arc_easy",
        "arc_challenge",
        "mmlu",
        "gsm8k",
        "humaneval",
        "smoltalk",
    )  # of the hub
    identity: str | None = None  # a jsonl file of your own conversations about who the model is
    task_folder: str | None = None  # TASK/SPLIT.parquet or .jsonl of your own instead of the hub's
    # Of what is fetched, by file name; an empty one takes whatever comes. PINNED has those that are known.
    sha256: dict[str, str] = {}  # noqa: RUF012

    @field_validator("identity", "task_folder")
    @classmethod
    def _absolute(cls, place: str | None) -> str | None:
        """Named in full: a stage, or a worker, may run elsewhere than this command."""
        return None if place is None else str(Path(place).expanduser().absolute())

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        from nanochat_core.data.tasks.tables import SOURCES

        for name in tasks:
            if name not in SOURCES:
                raise ValueError(f"{name!r} is not a data set to bring; those are {', '.join(SOURCES)}")
        return tasks

    def facts(self, stage: Planned) -> dict[str, float]:
        return {"download": HUB_BYTES} if self.source == "hub" else {}


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Make the assets from the embedded corpus, or fetch those that the full-size profiles use."""
    if cfg.source == "embedded":
        _embedded(job.path)
    else:
        _hub(cfg, job)
    if cfg.identity is not None:
        _identity(cfg.identity, job)
    if cfg.source == "hub" or cfg.task_folder is not None:
        _tasks(cfg, job)
    return check(job.path)


def _embedded(path: Path) -> None:
    import json

    from nanochat_core.artifacts.store import write_whole
    from nanochat_core.data.tasks import identity, words
    from nanochat_core.sources import bundle

    for name, content in bundle.files().items():
        (path / BUNDLE / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path / BUNDLE / name, content)
    write_whole(path / IDENTITY, "".join(json.dumps(row) + "\n" for row in identity.conversations()))
    write_whole(path / WORDS, "\n".join(words.WORDS) + "\n")


def _hub(cfg: Config, job: Job[Config]) -> None:
    from nanochat_core.artifacts.store import locked, write_whole
    from nanochat_core.data.tasks.identity import mended
    from nanochat_core.sources.download import fetch, offline, unzip
    from nanochat_core.sources.http import Remote

    root = job.runtime.base_dir / "downloads" / "assets"
    names = {f"{BUNDLE}.zip": cfg.bundle_url, IDENTITY: cfg.identity_url, WORDS: cfg.words_url}
    if cfg.identity is not None:
        del names[IDENTITY]
    remotes = [
        Remote(
            url,
            root / name,
            sha256=cfg.sha256.get(name, PINNED.get(url)) or None,
            other=f'; if that is the file you want: --set \'assets.sha256={{"{name}" = "SHA256"}}\'',
        )
        for name, url in names.items()
    ]
    patience = 60 * job.runtime.network_minutes
    with locked(root.with_name("assets.lock")):
        fetch(remotes, offline=offline(), patience=patience, progress=job.arrived)
    unzip(root / f"{BUNDLE}.zip", job.path)
    write_whole(job.path / WORDS, (root / WORDS).read_bytes())
    if IDENTITY in names:
        content, cut = mended((root / IDENTITY).read_bytes())
        if cut:
            note = f"{cut} of the published identity conversations ended in a question, which was cut off"
            print(note, flush=True)
            job.record(step=1, steps=1, note=note)
        write_whole(job.path / IDENTITY, content)


def _identity(name: str, job: Job[Config]) -> None:
    """Keep a copy of the user's conversations: what is trained on stays as it was when it was checked."""
    from nanochat_core.artifacts.store import write_whole
    from nanochat_core.data.tasks import identity

    path = Path(name)
    if not path.is_file():
        raise ValueError(f"assets.identity: there is no file {path}; `nanochat identity {path}` makes one")
    job.made_from(path)
    identity.read(path)
    write_whole(job.path / IDENTITY, path.read_bytes())


def _tasks(cfg: Config, job: Job[Config]) -> None:
    import time

    from nanochat_core.data.tasks import humaneval, tables
    from nanochat_core.data.tasks.base import SPLITS
    from nanochat_core.sources.download import offline
    from nanochat_core.sources.http import endpoint
    from nanochat_core.sources.retry import Patience

    if "humaneval" in cfg.tasks:
        humaneval.check_sandbox()
    folder = None if cfg.task_folder is None else Path(cfg.task_folder)
    if folder is not None:
        job.made_from(folder, (".parquet", ".jsonl"))
    minutes = job.runtime.network_minutes
    for i, name in enumerate(cfg.tasks):
        source = tables.SOURCES[name]

        def tell(waiting: str, at: int = i) -> None:
            job.arrived(at, len(cfg.tasks), waiting)

        patience = None if offline() else Patience(endpoint(), 60 * minutes, time.sleep, tell)
        for split in source.splits:
            path = job.path / tables.FOLDER / name / f"{split}.arrow"
            if split == "validation" and folder is not None and not tables.given(folder, name, split):
                continue  # some of the train rows are for that
            if not path.is_file():
                count = tables.bring(name, split, path, folder, patience)
                print(f"{name} ({split}): {count} rows", flush=True)
        for split in filter(source.has, SPLITS):
            _check_rows(name, split, job.path, "" if folder is None else f"{folder}/")
        job.record(step=i + 1, steps=len(cfg.tasks))


def _check_rows(name: str, split: "Split", assets: Path, folder: str) -> None:
    """Make conversations of a few thousand rows: what is wrong with the data is said now."""
    from nanochat_core.data.tasks import load_task, tables
    from nanochat_core.tokenizer.render import checked

    task = load_task(name, split, assets=assets)
    order = tables.table(name, split, assets).order
    for i in range(0, len(task), max(1, len(task) // CHECKED_ROWS)):
        try:
            checked(task[i])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{folder}{name}/{split}, row {order[i] + 1}, makes no conversation: {error}"
            ) from None


def check(path: Path) -> Metrics:
    """Count what is there; an unreadable or incomplete piece is an error now, not after days of training."""
    from nanochat_core.data.tasks import identity
    from nanochat_core.eval import core
    from nanochat_core.sources.raw_text import not_utf8

    for file in [*sorted((path / BUNDLE).rglob("*.*")), path / WORDS]:
        if file.is_file() and (line := not_utf8(str(file))) is not None:
            raise ValueError(f"{file}, line {line}, is not UTF-8: convert the file first")
    tasks = core.read_bundle(path / BUNDLE)
    examples = sum(len(core.read_examples(task)) for task in tasks)
    words = (path / WORDS).read_text(encoding="utf-8").split()
    if not words:
        raise ValueError(f"{path / WORDS} is empty: expected one word a line")
    return {
        "core_tasks": len(tasks),
        "core_examples": examples,
        "identity_conversations": len(identity.read(path / IDENTITY)),
        "words": len(words),
    }
