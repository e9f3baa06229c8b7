import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_core.data.mixture import load_mixture
from nanochat_core.data.tasks import TASKS, Problem, Task, check_name, load_task
from nanochat_core.data.tasks.base import SPLITS, last_number, multiple_choice, truth
from nanochat_core.data.tasks.word_problems import evaluate
from nanochat_core.infer.tool_use import calculate
from nanochat_core.runner import plan as plans
from nanochat_core.stages import chat_eval, mid, sft
from nanochat_core.tokenizer.render import render_conversation

GENERATED = (
    "word_problems",
    "word_problems_hard",
    "capitals",
    "spelling",
    "counting",
    "identity",
    "chitchat",
    "facts",
    "choices",
    "tool_format",
)


def question(problem: Problem) -> str:
    content = problem["messages"][0]["content"]
    assert isinstance(content, str)
    return content


def as_decoded(problem: Problem) -> str:
    """The right answer as a tokenizer would decode it."""
    content = problem["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    marks = {"text": ("", ""), "python": ("<|python_start|>", "<|python_end|>")}
    marks["python_output"] = ("<|output_start|>", "<|output_end|>")
    return "".join(marks[part["type"]][0] + part["text"] + marks[part["type"]][1] for part in content)


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("split", SPLITS)
def test_every_row_accepts_its_own_answer_and_refuses_another(name: str, split: str) -> None:
    task = load_task(name, split, size=300)  # type: ignore[arg-type]
    assert len(task) == 300
    for i in range(300):
        assert task.correct(task[i], as_decoded(task[i]))
        assert task.reward(task[i], as_decoded(task[i])) == 1.0
        assert not task.correct(task[i], "I do not know")
    with pytest.raises(IndexError, match=f"{name} has 300 rows"):
        task[300]


@pytest.mark.parametrize("name", ["word_problems", "word_problems_hard", "counting", "tool_format"])
def test_train_and_test_share_no_numbers_and_no_call(name: str) -> None:
    def calls(task: Task) -> set[str]:
        found = set()
        for i in range(len(task)):
            content = task[i]["messages"][-1]["content"]
            found |= {
                part["text"] for part in content if not isinstance(part, str) and part["type"] == "python"
            }
        return found

    train, test = (load_task(name, split, size=3000) for split in ("train", "test"))
    assert calls(train) and calls(test)
    if name == "word_problems_hard":  # the same sum may occur where another number did not matter
        numbers = [
            {(tuple(filter(str.isdigit, question(t[i]).replace(".", "").split())),) for i in range(3000)}
            for t in (train, test)
        ]
        assert not numbers[0] & numbers[1]
    else:
        assert not calls(train) & calls(test)


def test_small_talk_and_choices_keep_their_test_rows_apart() -> None:
    for name in ("chitchat", "choices"):
        train, test = (load_task(name, split) for split in ("train", "test"))
        asked = [{question(t[i]).split("\n")[0] for i in range(len(t))} for t in (train, test)]
        if name == "choices":
            assert not asked[0] & asked[1]
        else:  # people do say hello alike
            assert len(asked[0] & asked[1]) < 0.1 * len(asked[1])


@pytest.mark.parametrize("name", ["word_problems", "word_problems_hard", "counting", "tool_format"])
def test_tool_calls_say_what_the_calculator_says(name: str) -> None:
    task = load_task(name, "train", size=500)
    for i in range(500):
        content = task[i]["messages"][-1]["content"]
        assert isinstance(content, list)
        (call,) = [part["text"] for part in content if part["type"] == "python"]
        (output,) = [part["text"] for part in content if part["type"] == "python_output"]
        assert calculate(call) == output
        assert last_number(content[-1]["text"]) == last_number(output)


def test_no_number_asked_about_is_above_99() -> None:
    for name in ("word_problems", "word_problems_hard", "tool_format"):
        task = load_task(name, "train", size=500)
        for i in range(500):
            words = "".join(letter if letter.isdigit() else " " for letter in question(task[i])).split()
            assert all(int(word) <= 99 for word in words)


@pytest.mark.parametrize(
    "expression", ["3+4", "9-2*3", "2*3+4", "(3+4)*5", "9-3-2", "9-3+2-1", "2*3*4", "3-5"]
)
def test_our_own_sums_come_to_what_python_says(expression: str) -> None:
    assert evaluate(expression) == eval(expression)


def test_an_answer_must_be_put_into_words_after_the_tool() -> None:
    task = load_task("word_problems", "test", size=1)
    said = as_decoded(task[0])
    assert not task.correct(task[0], said[: said.index("<|output_end|>") + len("<|output_end|>")])


def test_answers_count_as_numbers_names_without_accents_and_letters_apart() -> None:
    sums = load_task("word_problems", "test", size=1)
    number = last_number(as_decoded(sums[0]))
    assert sums.correct(sums[0], f"So it is {number}.0.") and not sums.correct(sums[0], f"{number}1")
    assert last_number("#### 1,000.") == 1000 and last_number("none") is None

    capitals = load_task("capitals", "test")
    brazil = next(capitals[i] for i in range(len(capitals)) if capitals[i]["answer"] == "Brasília")
    assert capitals.correct(brazil, "The capital of Brazil is Brasilia.")
    assert not capitals.correct(brazil, "Brasilia is not Rio.")

    spelling = load_task("spelling", "test")
    letters = as_decoded(spelling[0])
    assert spelling.correct(spelling[0], letters.replace(" ", " - "))
    assert not spelling.correct(spelling[0], letters.replace(" ", ""))  # that is the word, not its spelling


def test_multiple_choice_puts_the_letter_right_after_its_choice() -> None:
    problem = multiple_choice("Which?", ["red", "blue"], 1)
    assert question(problem) == "Multiple choice: Which?\n- red=A\n- blue=B\n\nAnswer with the letter only."
    assert (problem["letters"], problem["messages"][1]["content"]) == (["A", "B"], "B")


def test_rows_are_the_same_in_another_process() -> None:
    code = (
        "import json; from nanochat_core.data.mixture import load_mixture;"
        "m = load_mixture({'word_problems_hard': 20, 'counting': 20, 'capitals': 20, 'choices': 5});"
        "print(json.dumps([[m.name(i), m[i]] for i in range(len(m))]))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    m = load_mixture({"word_problems_hard": 20, "counting": 20, "capitals": 20, "choices": 5})
    assert json.loads(there) == [[m.name(i), m[i]] for i in range(len(m))]


def test_thousands_of_rows_are_made_in_a_second() -> None:
    for name in GENERATED:
        task = load_task(name, "train", size=2000)
        started = time.perf_counter()
        for i in range(2000):
            task[i]
        assert time.perf_counter() - started < 1, name


def test_a_mixture_oversamples_in_a_fixed_order() -> None:
    m = load_mixture({"identity": 300, "capitals": 50}, seed=1)
    assert len(m) == 350
    assert sum(m.name(i) == "identity" for i in range(350)) == 300
    assert [m.name(i) for i in range(350)] == [
        load_mixture({"identity": 300, "capitals": 50}, seed=1).name(i) for i in range(350)
    ]
    assert m.order != load_mixture({"identity": 300, "capitals": 50}, seed=2).order
    assert [row for row in itertools.islice(m, 3)] == [m[0], m[1], m[2]]
    with pytest.raises(ValueError, match="at least one task"):
        load_mixture({})


def test_a_name_with_a_slice_means_these_rows_only() -> None:
    whole = load_task("identity", "train")
    for name, rows in (
        ("identity[5:]", range(5, len(whole))),
        ("identity[:5]", range(5)),
        ("identity[2:20:3]", range(2, 20, 3)),
        ("identity[-4:]", range(len(whole) - 4, len(whole))),
        ("identity[::-1]", range(len(whole) - 1, -1, -1)),
    ):
        view = load_task(name, "train")
        assert [view[i] for i in range(len(view))] == [whole[i] for i in rows]
        assert (view.name, view.kind, view.baseline) == (name, "generative", 0)
        assert view.correct(view[0], truth(view[0])) and view.reward(view[0], "nothing of the kind") == 0
        assert len(load_task(name, "train", size=3)) == 3
    assert len(load_task("counting[100000:]", "train")) == 0
    assert load_task("counting[7:9]", "train")[1] == load_task("counting", "train")[8]
    assert load_task("choices[:10]", "test").baseline == 0.25
    with pytest.raises(IndexError, match="there is no row 5"):
        load_task("identity[:5]", "train")[5]
    with pytest.raises(ValueError, match=r"identity\[::0\]: the step of a slice cannot be 0"):
        check_name("identity[::0]")
    with pytest.raises(ValueError, match="no task 'capitols'"):
        check_name("capitols[:5]")


def test_slices_of_a_task_share_its_rows_out_in_a_mixture() -> None:
    m = load_mixture({"identity[:40]": 40, "identity[40:]": 30, "identity[:2]": 6}, order="in_turn")
    whole = load_task("identity", "train")
    assert [m[i] for i in range(70)] == [whole[i] for i in range(70)]
    assert [m[i] for i in range(70, 76)] == [whole[0], whole[1]] * 3  # oversampled
    with pytest.raises(ValueError, match=r"identity\[9000:\] has no rows"):
        load_mixture({"identity[9000:]": 5})


def test_tasks_in_turn_come_as_they_are_listed() -> None:
    m = load_mixture({"capitals": 5, "identity": 3, "spelling": 4}, order="in_turn")
    assert [m.name(i) for i in range(12)] == ["capitals"] * 5 + ["identity"] * 3 + ["spelling"] * 4
    assert sft.Config(order="in_turn").order == "in_turn"


def test_the_real_profiles_mixtures_are_nanochats() -> None:
    assert {**mid.Config().mixture} == {
        "smoltalk": 459_341, "mmlu": 99_842, "gsm8k": 7_100, "identity": 2_000, "spelling": 200_000,
        "spellingbee": 80_000,
    }  # fmt: skip
    assert abs(sum(sft.Config().mixture.values()) + 373 - 22_439) < 10  # what its own log counted
    for profile in plans.profile_names():
        made = plans.load(profile, base_dir=Path("/nowhere")).jobs
        if made["assets"].config.source == "hub":
            assert made["mid"].config.mixture == mid.Config().mixture
            assert made["sft"].config.mixture == sft.Config().mixture
            arch = made["pretrain"].config.arch
            assert made["mid"].config.loss_on == {"seed": "all", "modern": "assistant"}[arch], profile
        assert made["sft"].config.loss_on == "assistant"


def test_an_unknown_task_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no task 'capitols'; the tasks are .*capitals"):
        load_task("capitols", "train")
    assert set(GENERATED) <= set(TASKS)
    with pytest.raises(ValueError, match="no task 'capitols'"):  # before anything runs
        chat_eval.Config(tasks=("capitals", "capitols"))


def test_identity_reads_the_assets_of_a_real_run(tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": "who?"}, {"role": "assistant", "content": "nanochat"}]]
    path = tmp_path / "identity_conversations.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert question(load_task("identity", "train", assets=tmp_path)[0]) == "who?"
    path.write_text('{"oops": 1}\n')
    with pytest.raises(ValueError, match="line 1: expected a list of messages"):
        load_task("identity", "train", assets=tmp_path)
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_task("identity", "train", assets=tmp_path)


def test_every_generated_conversation_renders() -> None:
    from nanochat_core.tokenizer.bpe import train

    tokenizer = train(["how many apples are there in the box"], 270)
    for name in GENERATED:
        task = load_task(name, "train", size=20)
        for i in range(20):
            assert sum(render_conversation(tokenizer, task[i]).mask) > 0
