"""A data set of the hub at one commit, through the hub's own library and its cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_core.sources.http import HTTP_TRANSIENT, RetryableError
from nanochat_core.sources.retry import Patience, insistently

if TYPE_CHECKING:
    import pyarrow as pa


def hub_rows(
    repo: str, config: str | None, split: str, commit: str, patience: Patience | None, by_hand: str
) -> "pa.Table":
    """The rows from the library's cache if it has that commit, else from the hub.

    `patience` is for the hub; None: it is not to be asked. `by_hand` is what else the user can do.
    """
    found = cached(repo, config, split, commit)
    if found is None:
        if patience is None:
            raise ValueError(
                f"NANOCHAT_OFFLINE is set and {repo} ({split}) is on the hub, and of commit {commit[:12]} "
                f"there is nothing in the cache of `datasets`: {by_hand}"
            )
        found = insistently(lambda: _load(repo, config, split, commit, by_hand), patience, by_hand)
    return found.with_format("arrow")[:]


def cached(repo: str, config: str | None, split: str, commit: str) -> Any:
    """What an earlier program had from the hub, of this very commit: the library by itself takes any."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, name = repo.split("/")
    root = datasets.config.HF_DATASETS_CACHE
    folder = Path(root) / f"{owner}___{camelcase_to_snakecase(name)}"
    for place in sorted(folder.glob(f"{config or '*'}/*/{commit}")):
        known = {"config_name": place.parts[-3], "version": place.parts[-2], "hash": commit}
        builder = Cache(cache_dir=str(root), repo_id=repo, dataset_name=name, **known)
        if split in (builder.info.splits or {}):
            return builder.as_dataset(split=split)
    return None


def _load(repo: str, config: str | None, split: str, commit: str, by_hand: str) -> Any:
    from datasets import load_dataset

    try:
        found = load_dataset(repo, config, split=split, revision=commit)
    except Exception as error:  # its own, those of two HTTP libraries, pyarrow's, fsspec's
        why = words(error)
        if passing(error):
            raise RetryableError(f"{repo}, {why}") from error
        raise ValueError(f"{repo} ({split}) could not be fetched ({why}): try again, or {by_hand}") from error
    if any(commit not in file["filename"] for file in found.cache_files):
        raise ValueError(  # the library falls back on what it has, with a warning
            f"{repo} ({split}) could not be fetched, only another commit than {commit[:12]} is in the cache "
            f"of `datasets`: try again, or {by_hand}"
        )
    return found


def newest(repo: str, revision: str | None) -> str:
    """The commit that a name means now; None stands for the main branch."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(repo, revision=revision).sha
    except Exception as error:
        raise ValueError(
            f"{repo} ({revision or 'main'}) could not be had from the hub ({words(error)}): check the name, "
            "the revision and your access, or try again; --revision COMMIT asks for nothing"
        ) from error
    assert commit is not None
    return commit


def words(error: BaseException) -> str:
    """What an error of the hub's libraries says: its first line, for some add a page of advice."""
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")


def passing(error: BaseException | None) -> bool:
    """Whether an error of the hub's libraries comes of the line or the server's load, and may pass."""
    from datasets import config

    if config.HF_HUB_OFFLINE:
        return False
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status in HTTP_TRANSIENT
        names = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or "TransportError" in names:
            return True
        error = error.__cause__ or error.__context__
    return False
