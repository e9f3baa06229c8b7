"""The tasks of the hub's data sets, on small files of the same schema."""

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_core.artifacts.stage import Job, Runtime
from nanochat_core.data.tasks import Problem, load_task
from nanochat_core.data.tasks import humaneval as humaneval_task
from nanochat_core.data.tasks.base import SPLITS, truth
from nanochat_core.data.tasks.gsm8k import parts
from nanochat_core.infer import sandbox
from nanochat_core.stages import assets

ARC = {
    "question": "What melts?",
    "choices": {"text": ["ice", "stone", "air"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
MMLU = {"question": "2+2?", "subject": "sums", "choices": ["1", "2", "3", "4"], "answer": 3}
GSM8K = {"question": "How much?", "answer": "It is 2*5=<<2*5=10>>10 and\n#### 1,010"}
HUMANEVAL = {
    "task_id": "x/0",
    "prompt": "from typing import List\n\n\ndef double(x: int) -> int:\n    '''Twice x.'''\n",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    "entry_point": "double",
}
TALK = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
    "source": "s",
}
ROWS = {
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "mmlu": MMLU,
    "gsm8k": GSM8K,
    "humaneval": HUMANEVAL,
    "smoltalk": TALK,
}


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(autouse=True)
def weaker_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """These programs are ours: the tests run them on machines without bubblewrap, too."""
    weaker = functools.partial(sandbox.run_program, allow_weaker=True)
    monkeypatch.setattr(humaneval_task, "run_program", weaker)


@pytest.fixture
def brought(tmp_path: Path) -> Path:
    """The assets of a user who has the data sets in a folder."""
    mine = tmp_path / "mine"
    for name, row in ROWS.items():
        train = [{"train": row}] * 3 if name == "mmlu" else [row] * 3
        write(mine / name / "train.parquet", train)
        write(mine / name / "test.jsonl", [row])
    cfg = assets.Config(task_folder=str(mine))
    path = tmp_path / "assets" / "f"
    path.mkdir(parents=True)
    assets._tasks(cfg, Job("assets", cfg, {}, path, Runtime(base_dir=tmp_path), "f"))
    return path


def test_rows_become_conversations_that_their_own_answers_satisfy(brought: Path) -> None:
    for name in ROWS:
        task = load_task(name, "test", assets=brought)
        assert len(task) == 1
        if name != "smoltalk":
            assert task.correct(task[0], truth(task[0])), name
            assert not task.correct(task[0], "nothing of the kind"), name
    assert load_task("arc_easy", "train", assets=brought, size=2)[1]["messages"][1]["content"] == "A"
    assert load_task("mmlu", "train", assets=brought)[0]["messages"][1]["content"] == "D"
    assert load_task("gsm8k", "test", assets=brought).baseline == 0
    assert load_task("mmlu", "test", assets=brought).baseline == 0.25


def test_gsm8k_marks_become_calls_and_answers_compare_as_numbers(brought: Path) -> None:
    assert parts(str(GSM8K["answer"])) == [
        {"type": "text", "text": "It is 2*5="},
        {"type": "python", "text": "2*5"},
        {"type": "python_output", "text": "10"},
        {"type": "text", "text": "10 and\n#### 1,010"},
    ]
    task = load_task("gsm8k", "test", assets=brought)
    for said in ("#### 1010", "#### 1,010.", "so\n#### 1010.0", "#### 1010 or 3"):
        assert task.correct(task[0], said)
    for said in ("1010", "#### 10", "####", "#### 3 or 1010"):
        assert not task.correct(task[0], said)


def test_what_is_missing_is_said_with_what_to_do(brought: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="humaneval has no train split"):
        load_task("humaneval", "train", assets=brought)
    with pytest.raises(ValueError, match=r"the assets hold no gsm8k \(test\): add it to assets.tasks"):
        load_task("gsm8k", "test", assets=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "?"}], "no column 'answer', only question"),
        ([], "expected one JSON object a line|no column|is empty"),
        (["text"], "expected one JSON object a line"),
    ],
)
def test_a_broken_data_set_is_named_with_what_was_expected(
    tmp_path: Path, rows: list[Any], said: str
) -> None:
    from nanochat_core.data.tasks import tables

    write(tmp_path / "gsm8k" / "test.jsonl", rows)
    with pytest.raises(ValueError, match=rf"gsm8k.*({said})"):
        tables.bring("gsm8k", "test", tmp_path / "out.arrow", tmp_path, None)
    assert not (tmp_path / "out.arrow").exists()


def leave(cache: Path, commit: str, rows: list[Any]) -> None:
    """What the library leaves in its cache of gsm8k at a commit."""
    import datasets

    place = cache / "openai___gsm8k" / "main" / "0.0.0" / commit
    made = datasets.Dataset.from_list(rows)
    place.mkdir(parents=True)
    table = made.data.table
    with (
        pa.OSFile(str(place / "gsm8k-test.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as to,
    ):
        to.write_table(table)
    splits = datasets.SplitDict(dataset_name="gsm8k")
    splits.add(datasets.SplitInfo("test", num_examples=len(rows), dataset_name="gsm8k"))
    info = datasets.DatasetInfo(
        features=made.features, config_name="main", dataset_name="gsm8k", splits=splits
    )
    info.write_to_directory(str(place))


@pytest.mark.slow  # the library takes seconds to import
def test_offline_the_librarys_cache_of_the_pinned_commit_is_used_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from nanochat_core.data.tasks import tables

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    leave(tmp_path / "cache", "0" * 40, [GSM8K] * 3)
    with pytest.raises(ValueError, match=r"NANOCHAT_OFFLINE is set and openai/gsm8k .* assets\.task_folder"):
        tables.bring("gsm8k", "test", tmp_path / "out.arrow", None, None)
    leave(tmp_path / "cache", tables.SOURCES["gsm8k"].revision, [GSM8K] * 2)
    assert tables.bring("gsm8k", "test", tmp_path / "out.arrow", None, None) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (RuntimeError("the files have other columns"), False),
        (ConnectionError("Couldn't reach the hub"), True),
        (type("ConnectError", (type("TransportError", (Exception,), {}),), {})("no route"), True),
    ],
)
def test_what_the_hubs_library_raises_becomes_a_sentence_and_what_may_pass_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, passes: bool
) -> None:
    import datasets

    from nanochat_core.data.tasks import tables
    from nanochat_core.sources.retry import Patience

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tries: list[str] = []

    def load_dataset(repo: str, *_: Any, **__: Any) -> Any:
        tries.append(repo)
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    patience = Patience("https://hub", 60, lambda seconds: None, lambda waiting: None)
    with pytest.raises(ValueError, match=r"openai/gsm8k.*task_folder"):
        tables.bring("gsm8k", "test", tmp_path / "out.arrow", None, patience)
    assert (len(tries) > 3) == passes


def humaneval(tests: str) -> Problem:
    problem = Problem(messages=[{"role": "user", "content": "import math\ndef f(x):\n"}])
    problem["tests"], problem["entry_point"] = tests, "f"
    return problem


def test_programs_are_taken_from_the_first_code_block_with_the_prompts_imports(brought: Path) -> None:
    task = load_task("humaneval", "test", assets=brought)
    asked = humaneval("def check(f):\n    assert f(2) == math.sqrt(4)\n")
    assert task.correct(asked, "Here:\n```python\ndef f(x):\n    return x\n```\nand\n```\nnonsense\n```")
    assert task.correct(asked, "def f(x):\n    return x")
    assert not task.correct(asked, "```python\ndef f(x):\n    return x + 1\n```")


def test_programs_that_need_200_mb_and_a_second_pass_and_those_that_leave_early_fail(brought: Path) -> None:
    task = load_task("humaneval", "test", assets=brought)
    asked = humaneval("def check(f):\n    assert f(25_000_000) == 25_000_000\n")
    heavy = "import time\ndef f(x):\n    time.sleep(1)\n    return len([0] * x)"
    assert task.correct(asked, heavy)
    assert not task.correct(asked, "raise SystemExit(0)")
    assert not task.correct(asked, "import os; os._exit(0)")


def test_a_machine_that_cannot_run_programs_says_so_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise sandbox.NoSandbox("bubblewrap is missing")

    monkeypatch.setattr(humaneval_task, "run_program", refuse)
    cfg = assets.Config(task_folder=str(tmp_path))
    with pytest.raises(ValueError, match="bubblewrap is missing"):
        assets._tasks(cfg, Job("assets", cfg, {}, tmp_path, Runtime(base_dir=tmp_path), "f"))


def test_spellingbee_train_and_test_share_no_word_and_letter(tmp_path: Path) -> None:
    (tmp_path / "words_alpha.txt").write_text(
        "\n".join(["strawberry", "raspberry", "kiwi", "banana", "plum"])
    )

    def calls(split: Any, count: int) -> set[str]:
        task = load_task("spellingbee", split, size=count, assets=tmp_path)
        found = set()
        for i in range(count):
            content = task[i]["messages"][1]["content"]
            assert isinstance(content, list)
            found.add(content[1]["text"])
            assert task.correct(task[i], f"... #### {content[2]['text']}.")
        return found

    train, test = calls("train", 600), calls("test", 600)
    assert train and test and not train & test


def test_spelling_a_long_list_keeps_each_splits_words_apart(tmp_path: Path) -> None:
    import itertools

    words = ["".join(letters) for letters in itertools.product("abcdefghijk", repeat=3)]
    (tmp_path / "words_alpha.txt").write_text("\n".join(words))
    spelled = [
        {str(task[i]["messages"][1]["content"]) for i in range(len(task))}
        for task in (load_task("spelling", split, assets=tmp_path) for split in SPLITS)
    ]
    assert len(set.union(*spelled)) == sum(map(len, spelled)) == len(words)


def test_custom_json_is_named_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write(path, [TALK, TALK["messages"]])
    task = load_task(f"custom_json:{path}", "test")
    assert len(task) == 2 and task[1]["messages"] == TALK["messages"]
    with pytest.raises(ValueError, match="is not there"):
        load_task("custom_json:/nowhere.jsonl", "train")
