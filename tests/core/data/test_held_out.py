"""What models are validated on and chosen by is neither trained on nor asked by evaluations."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nanochat_core.data.mixture import load_mixture
from nanochat_core.data.tasks import load_task, tables
from nanochat_core.data.tasks.base import SPLITS, Task
from nanochat_core.stages import sft


def questions(task: Task) -> list[str]:
    return [json.dumps(task[i]["messages"][0]["content"]) for i in range(len(task))]


def arrow(assets: Path, name: str, split: str, rows: list[dict[str, Any]]) -> None:
    path = assets / tables.FOLDER / name / f"{split}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(("rows", "held_out"), [(2, 1), (100, 5), (30_000, 1000)])
def test_a_data_set_without_a_validation_split_gives_the_end_of_its_order(
    tmp_path: Path, rows: int, held_out: int
) -> None:
    for split in ("train", "test"):
        arrow(
            tmp_path, "gsm8k", split, [{"question": f"{split} {i}", "answer": "#### 1"} for i in range(rows)]
        )
    asked = {split: questions(load_task("gsm8k", split, assets=tmp_path)) for split in SPLITS}
    assert [len(asked[split]) for split in SPLITS] == [rows - held_out, held_out, rows]
    assert sorted(asked["train"] + asked["validation"]) == sorted(f'"train {i}"' for i in range(rows))


def test_a_data_sets_own_validation_split_leaves_all_of_train(tmp_path: Path) -> None:
    for split in SPLITS:
        rows = [{"question": f"{split} {i}", "choices": list("abcd"), "answer": 0} for i in range(40)]
        arrow(tmp_path, "mmlu", split, rows)
    for split in SPLITS:
        asked = questions(load_task("mmlu", split, assets=tmp_path))
        assert len(asked) == 40 and all(split in question for question in asked)


def talk(i: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"q {i}"},
            {"role": "assistant", "content": f"a {i}"},
        ]
    }


@pytest.mark.parametrize(("rows", "held_out"), [(2, [1]), (49, [48]), (120, [49, 99])])
def test_every_fiftieth_row_of_a_file_of_ones_own_is_held_out(
    tmp_path: Path, rows: int, held_out: list[int]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(talk(i)) + "\n" for i in range(rows)))
    name = f"custom_json:{path}"
    assert questions(load_task(name, "validation")) == [f'"q {i}"' for i in held_out]
    left = [f'"q {i}"' for i in range(rows) if i not in held_out]
    assert questions(load_task(name, "train")) == left
    assert len(load_task(name, "test")) == rows
    mixture = load_mixture({name: rows})
    assert {str(row["messages"][0]["content"]) for row in mixture} == {json.loads(q) for q in left}


def test_of_one_conversation_none_can_be_held_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(talk(0)))
    with pytest.raises(ValueError, match=r"mine\.jsonl has one conversation: two are needed"):
        load_task(f"custom_json:{path}", "train")


def test_many_identity_conversations_are_split_and_few_are_a_closed_set(tmp_path: Path) -> None:
    path = tmp_path / "identity_conversations.jsonl"
    for rows, held_out in ((499, 0), (1000, 20)):
        path.write_text("".join(json.dumps(talk(i)) + "\n" for i in range(rows)))
        train, validation = (
            set(questions(load_task("identity", s, assets=tmp_path))) for s in ("train", "validation")
        )
        assert len(train) == rows - held_out
        assert len(validation) == (held_out or rows) and bool(train & validation) == (not held_out)


@pytest.mark.parametrize(
    "name", ["word_problems", "word_problems_hard", "tool_format", "counting", "choices", "chitchat"]
)
def test_generated_splits_ask_different_things(name: str) -> None:
    train, validation, test = (set(questions(load_task(name, split, size=400))) for split in SPLITS)
    common = 0.1 if name == "chitchat" else 0  # people do say hello alike
    assert len(train & validation) <= common * len(validation)
    assert len(validation & test) <= common * len(test) and len(train & test) <= common * len(test)


def test_validation_moved_no_generated_training_row() -> None:
    """The bytes of the rows that the CPU profiles train on, from before there was such a split."""
    names = (
        "word_problems",
        "word_problems_hard",
        "tool_format",
        "counting",
        "choices",
        "spelling",
        "identity",
    )
    rows = [load_task(name, "train", size=200)[i] for name in names for i in range(200)]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest[:16] == "2470fc22ae5537f5"


def test_shares_of_the_mixture_are_validated_on_and_what_is_set_to_0_is_left_out() -> None:
    cfg = sft.Config(
        mixture={"smoltalk[:500]": 500, "smoltalk[500:]": 400, "gsm8k": 100, "mmlu": 0}, eval_rows=100
    )
    assert cfg.held_out() == {"smoltalk": 90, "gsm8k": 10}
    assert "mmlu" not in cfg.rows()


def test_the_letters_test_has_as_many_rows_as_was_published(tmp_path: Path) -> None:
    (tmp_path / "words_alpha.txt").write_text("strawberry raspberry kiwi banana plum cherry quince")
    assert len(load_task("spellingbee", "test", assets=tmp_path)) == 256
    assert len(load_task("spellingbee", "test", size=100, assets=tmp_path)) == 100
