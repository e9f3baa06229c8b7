"""Any text into shards: every document once, in an order of the seed alone, whatever happens on the way."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_core.sources import repackage as module
from nanochat_core.sources.documents import Shards, row_group, shard_list
from nanochat_core.sources.repackage import RepackageProgress, Wanted, finished, repackage
from nanochat_core.sources.shard_sets import local

DOCUMENTS = [f"document {i} " + "wörd " * (i * 7919 % 90) for i in range(900)]


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to write for so little text; one test shows that it makes no difference."""
    monkeypatch.setattr(module, "BUCKETS", 64)


def source(folder: Path, documents: list[str] = DOCUMENTS) -> str:
    """The documents in three kinds of files."""
    folder.mkdir(parents=True)
    third = len(documents) // 3
    pq.write_table(pa.table({"text": documents[:third]}), folder / "a.parquet", row_group_size=100)
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in documents[third : 2 * third])
    (folder / "below").mkdir()
    (folder / "below" / "b.jsonl").write_text(lines)
    with gzip.open(folder / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents[2 * third :])
    return str(folder)


def documents_of(shards: Shards) -> list[str]:
    found = []
    for shard in shards.train + shards.validation:
        for group in range(shard.row_groups):
            found += row_group(shard.path, group)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_every_document_comes_once_in_shards_of_the_size_asked_for(tmp_path: Path) -> None:
    shards = repackage(Wanted(source(tmp_path / "mine"), shard_chars=50_000), tmp_path / "out")
    found = documents_of(shards)
    assert sorted(found) == sorted(DOCUMENTS) and found != DOCUMENTS
    sizes = [sum(map(len, documents_of(Shards((shard,), ())))) for shard in shards.train]
    assert len(sizes) == 5 and all(40_000 < size <= 50_500 for size in sizes)
    assert 0.01 < sum(map(len, documents_of(Shards((), shards.validation)))) / sum(sizes) < 0.03
    assert [s.name for s in shards.train + shards.validation] == sorted(files(tmp_path / "out"))
    assert shards.validation[0].name == "shard_00005.parquet"
    assert shard_list(tmp_path / "out", tmp_path / "out") == shards
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files(tmp_path / "out"), "shards.json"}


def test_shards_are_zstd_with_row_groups_of_1024(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(9000)))
    shards = repackage(Wanted(str(tmp_path / "a.jsonl")), tmp_path / "out")
    with pq.ParquetFile(shards.train[0].path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    assert [group.num_rows for group in groups[:-1]] == [1024] * 8
    assert groups[0].column(0).compression == "ZSTD"


def test_the_order_is_the_seeds_and_looks_shuffled(tmp_path: Path) -> None:
    mine = source(tmp_path / "mine")
    order = [
        [DOCUMENTS.index(text) for text in documents_of(repackage(Wanted(mine, seed=seed), tmp_path / name))]
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    ]
    assert files(tmp_path / "a") == files(tmp_path / "b") and order[0] != order[2]
    n = len(DOCUMENTS)
    mean = sum(range(n)) / n
    correlation = sum((i - mean) * (j - mean) for i, j in enumerate(order[0])) / sum(
        (i - mean) ** 2 for i in range(n)
    )
    assert abs(correlation) < 4 / n**0.5
    assert (
        sum(j == i + 1 for i, j in zip(order[0], order[0][1:], strict=False)) < 8
    )  # neighbours by chance: 1


@pytest.mark.parametrize("buckets", [2, 1024])
def test_how_it_is_sorted_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buckets: int
) -> None:
    mine = source(tmp_path / "mine")
    repackage(Wanted(mine, shard_chars=50_000), tmp_path / "a")
    monkeypatch.setattr(module, "BUCKETS", buckets)
    repackage(Wanted(mine, shard_chars=50_000), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 4, 5, 8, 11])
def test_work_that_was_ended_goes_on_to_the_same_bytes(tmp_path: Path, at: int) -> None:
    wanted = Wanted(source(tmp_path / "mine"), shard_chars=50_000)
    steps: list[RepackageProgress] = []
    repackage(wanted, tmp_path / "straight", steps.append)
    assert len(steps) == 11  # 5 runs, 6 shards
    seen: list[RepackageProgress] = []

    def end(step: RepackageProgress) -> None:
        seen.append(step)
        if len(seen) == at:
            raise Killed

    with pytest.raises(Killed):
        repackage(wanted, tmp_path / "out", end)
    with pytest.raises(ValueError, match="is not complete"):
        local(tmp_path / "out", tmp_path)
    again: list[RepackageProgress] = []
    repackage(wanted, tmp_path / "out", again.append)
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    assert seen + again == steps  # nothing was done twice
    done: list[RepackageProgress] = []
    repackage(wanted, tmp_path / "out", done.append)
    assert done == []


def test_other_text_or_another_seed_never_mixes_with_what_is_there(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    wanted = Wanted(source(mine), shard_chars=50_000)

    def end(step: RepackageProgress) -> None:
        raise Killed

    with pytest.raises(Killed):
        repackage(wanted, tmp_path / "out", end)
    (mine / "d.txt").write_text("one more")
    assert "one more" in documents_of(repackage(wanted, tmp_path / "out"))
    with pytest.raises(ValueError, match="already holds shards made from something else"):
        repackage(Wanted(str(mine), seed=7), tmp_path / "out")
    assert finished(tmp_path / "out") is not None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("mine")
    with pytest.raises(ValueError, match="already holds other files"):
        repackage(wanted, tmp_path / "full")
    (tmp_path / "out" / "shard_00001.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard_00001\.parquet is missing or changed"):
        repackage(wanted, tmp_path / "out")


def test_two_at_once_do_not_fill_one_folder(tmp_path: Path) -> None:
    with (
        module.at_work(tmp_path / "out"),
        pytest.raises(ValueError, match="another process is filling"),
    ):
        repackage(Wanted(source(tmp_path / "mine")), tmp_path / "out")


@pytest.mark.slow  # the library takes seconds to import
def test_a_data_set_is_read_with_the_hubs_own_library_and_resumed_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    rows = [{"body": text, "other": 1} for text in DOCUMENTS] + [{"body": None, "other": 2}]
    for i in range(3):
        pq.write_table(pa.Table.from_pylist(rows[i::3]), tmp_path / "owner" / "name" / f"train-{i}.parquet")
    monkeypatch.setattr(module, "source_of", lambda wanted: None)  # the library takes a folder for a data set
    commits = iter(["a" * 40, "b" * 40, "c" * 40, "d" * 40])
    monkeypatch.setattr(module, "newest", lambda repo, revision: next(commits))
    wanted = Wanted("owner/name", column="body", shard_chars=50_000)
    straight = repackage(wanted, tmp_path / "straight")
    assert sorted(documents_of(straight)) == sorted(DOCUMENTS)

    def end(step: RepackageProgress) -> None:
        if step.documents > 400:
            raise Killed

    with pytest.raises(Killed):
        repackage(wanted, tmp_path / "out", end)
    repackage(wanted, tmp_path / "out")
    made_from = json.loads((tmp_path / "out" / "shards.json").read_text())["made_from"]
    assert made_from["commit"] == "b" * 40  # of its first start, not of when it went on
    repackage(wanted, tmp_path / "out")
    shards = {name: each for name, each in files(tmp_path / "out").items() if name != "shards.json"}
    assert shards.items() <= files(tmp_path / "straight").items()
    with pytest.raises(ValueError, match=r"owner/name has no column 'text' \(it has body, other\)"):
        repackage(Wanted("owner/name"), tmp_path / "x")
    with pytest.raises(ValueError, match=r"owner/name .*test.* could not be had"):
        repackage(Wanted("owner/name", column="body", split="test"), tmp_path / "y")


def test_long_text_files_are_cut_without_being_read_whole(tmp_path: Path) -> None:
    line = "a line of a long book that goes on and on\n"
    (tmp_path / "book.txt").write_text("\ufeff  " + line * 60_000, encoding="utf-8")
    found = documents_of(repackage(Wanted(str(tmp_path / "book.txt")), tmp_path / "out"))
    assert all(len(text) <= 4000 and text.startswith("a line") and text.endswith("on") for text in found)
    assert sum(len(text) + 1 for text in found) == 60_000 * len(line)


def broken(folder: Path, name: str, content: Any) -> None:
    if isinstance(content, dict):
        pq.write_table(pa.table(content), folder / name)
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.parquet", {"body": ["x"]}, r"b\.parquet has no column 'text' \(it has body\)"),
        ("b.parquet", {"text": [1]}, r"b\.parquet: column 'text' holds int64, expected strings"),
        ("b.parquet", b"PAR1 half a file", r"b\.parquet is not a parquet file that can be read"),
        ("b.parquet", b"", r"b\.parquet is not a parquet file that can be read"),
        ("b.jsonl", b'{"text": "x"}\n{"text": 1}\n', r"b\.jsonl, line 2: expected .* string field 'text'"),
        ("b.jsonl", b'{"text": "x"}\n["x"]\n', r"b\.jsonl, line 2: expected an object"),
        ("b.jsonl", b'{"text": "x"}\n{"text": \n', r"b\.jsonl, line 2: not JSON"),
        ("b.jsonl", '{"text": "é"}\n'.encode() + b'{"text": "caf\xe9"}', r"b\.jsonl, line 2, is not UTF-8"),
        ("b.txt", "é\né\n".encode() + b"caf\xe9", r"b\.txt, line 3, is not UTF-8"),
        (
            "b.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 500, mtime=0)[:-20],
            r"b\.jsonl\.gz cannot be read",
        ),
        ("b.jsonl.gz", b'{"text": "x"}\n', r"b\.jsonl\.gz cannot be read"),
    ],
)
def test_a_broken_file_is_named_with_its_line_and_what_was_expected(
    tmp_path: Path, name: str, content: Any, said: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text('{"text": "fine"}\n')
    broken(tmp_path / "mine", name, content)
    with pytest.raises(ValueError, match=said):
        repackage(Wanted(str(tmp_path / "mine")), tmp_path / "out")


def test_sources_that_hold_no_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, said in (
        (tmp_path, r"holds no \.parquet"),
        (tmp_path / "nowhere", "neither a file or folder here, nor a URL, nor OWNER/NAME"),
        (f"file://{tmp_path}/nowhere", r"holds no \.parquet"),
        ("nosuch://bucket", "cannot be listed"),
    ):
        with pytest.raises(ValueError, match=said):
            repackage(Wanted(str(place)), tmp_path / "out")
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n{"text": "  "}\n')
    with pytest.raises(ValueError, match="has 1 documents with text"):
        repackage(Wanted(str(tmp_path / "one.jsonl")), tmp_path / "out")
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(ValueError, match="NANOCHAT_OFFLINE is set and owner/name is not here"):
        repackage(Wanted("owner/name"), tmp_path / "other")


def test_a_one_row_parquet_and_one_of_nulls_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["only one"]}), folder / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([None, "", "two"], pa.string())}), folder / "b.parquet")
    shards = repackage(Wanted(str(folder)), tmp_path / "out")
    assert sorted(documents_of(shards)) == ["only one", "two"]
    assert [shard.rows for shard in shards.train + shards.validation] == [1, 1]


COMMAND = """
import sys
from pathlib import Path
from nanochat_core.sources.repackage import Wanted, repackage
repackage(Wanted(sys.argv[1], shard_chars=int(sys.argv[3])), Path(sys.argv[2]))
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def test_what_a_killed_clearing_left_does_not_make_shards_again(tmp_path: Path) -> None:
    wanted, out = Wanted(source(tmp_path / "mine"), shard_chars=50_000), tmp_path / "out"
    shards, made = repackage(wanted, out), files(out)
    (out / "partial").mkdir()
    (out / "partial" / "run_00001.arrow").write_bytes(b"one of many, the rest is deleted")
    assert repackage(wanted, out) == shards
    assert files(out) == made and not (out / "partial").exists()


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_no_half_shard_and_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUCKETS", 1024)  # as in the processes that are killed
    rng = random.Random(1)
    text = [f"{i} " + "some words " * rng.randint(1, 400) for i in range(6_000)]
    mine = source(tmp_path / "mine", text)
    straight = repackage(Wanted(mine, shard_chars=500_000), tmp_path / "straight")
    out = tmp_path / "out"
    at: list[int] = []  # how many files were there when it was killed

    def there() -> int:
        return len(list(out.rglob("run_*.arrow"))) + len(list(out.glob("*.parquet")))

    while not at or at[-1] < 40:
        before = there()
        command = [sys.executable, "-c", COMMAND, mine, str(out), "500000"]
        with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
            while process.poll() is None and there() < before + 12:
                time.sleep(0.001 * rng.randint(1, 20))
            process.send_signal(signal.SIGKILL)
        at.append(there())
        for path in out.glob("*.parquet"):
            assert path.read_bytes() == (tmp_path / "straight" / path.name).read_bytes()
        if process.returncode == 0:
            break
    repackage(Wanted(mine, shard_chars=500_000), out)
    assert len(at) >= 3 and len(straight.train) > 10
    assert files(out) == files(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    peaks = []
    for name, documents in (("small", 4_000), ("big", 40_000)):  # 16 and 160 million characters
        mine = tmp_path / f"{name}.jsonl"
        with mine.open("w") as file:
            for i in range(documents):
                file.write(json.dumps({"text": f"{i} " + "some words of text " * 210}) + "\n")
        command = [sys.executable, "-c", COMMAND, str(mine), str(tmp_path / name), "4000000"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 40  # MB
