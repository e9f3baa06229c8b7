"""What the graders make of the shapes that answers come in, beside what other rules make of them.

`tests/golden/answers_*.jsonl` holds every shape with every verdict; NANOCHAT_WRITE_GOLDEN=1 writes it anew.
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from answer_shapes import PROMPT, Shape, numbers, programs

from nanochat_core.data.tasks import Problem
from nanochat_core.data.tasks.base import dialogue, final_number, last_number, spoken
from nanochat_core.data.tasks.humaneval import program
from nanochat_core.data.tasks.numbers import marked_number
from nanochat_core.data.tasks.programs import complete

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
TESTS = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n"


def ours(answer: str, truth: str) -> bool:
    return final_number(dialogue("?", f"So.\n#### {truth}"), answer)


def gsm8k(answer: str, truth: str) -> bool:
    """The rule of the data set's authors, and of nanochat: the text after the first mark, without commas."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", answer)
    return found is not None and found[1].strip().replace(",", "") == truth


def evaluated(pattern: str, group: int) -> Callable[[str, str], bool]:
    """The rule of a filter of lm-eval: one match of its pattern, without commas, $ and a last dot."""

    def right(answer: str, truth: str) -> bool:
        found = re.findall(pattern, answer)
        taken = found[group] if found else "[invalid]"
        text = taken if isinstance(taken, str) else next(part for part in taken if part)
        return normal(text.strip()) == normal(f"#### {truth}")

    return right


def normal(text: str) -> str:
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()


NUMBER_RULES: dict[str, Callable[[str, str], bool]] = {
    "ours": ours,
    "gsm8k": gsm8k,
    "strict": evaluated(r"#### (\-?[0-9\.\,]+)", 0),
    "flexible": evaluated(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
}


def asked() -> Problem:
    problem = Problem(messages=[{"role": "user", "content": PROMPT}])
    problem["tests"], problem["entry_point"] = TESTS, "double"
    return problem


def passes(source: str) -> bool:
    """Whether a program, one of ours, runs through."""
    try:
        exec(
            compile(source, "answer", "exec", dont_inherit=True),
            {"__name__": "__main__", "print": lambda *_: 0},
        )
    except (Exception, SystemExit):
        return False
    return True


def with_imports(code: str) -> bool:
    imports = [line for line in PROMPT.split("\n") if line.startswith(("import ", "from "))]
    return passes("\n".join([*imports, code, TESTS, "check(double)"]))


def first_block(answer: str) -> str:
    found = re.search(r"```(?:python)?\s*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return found[1] if found else answer


PROGRAM_RULES: dict[str, Callable[[str, str], bool]] = {
    "ours": lambda answer, _: passes(program(asked(), answer)),
    "nanochat": lambda answer, _: with_imports(first_block(answer)),
    "completion": lambda answer, _: passes(f"{PROMPT}{answer}\n{TESTS}check(double)"),  # the data set's own
}


def verdicts(shapes: Iterable[Shape], rules: dict[str, Callable[[str, str], bool]]) -> list[dict[str, Any]]:
    return [
        shape._asdict() | {name: rule(shape.answer, shape.truth) for name, rule in rules.items()}
        for shape in shapes
    ]


@pytest.mark.parametrize(
    ("name", "shapes", "rules"),
    [("gsm8k", numbers, NUMBER_RULES), ("humaneval", programs, PROGRAM_RULES)],
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_every_shape_gets_the_verdict_that_a_reader_would_give(
    name: str, shapes: Callable[[], Iterable[Shape]], rules: dict[str, Callable[[str, str], bool]]
) -> None:
    found = verdicts(shapes(), rules)
    assert len(found) >= 300 and len({(row["answer"], row["truth"]) for row in found}) >= 300
    assert [row for row in found if row["ours"] != row["right"]] == []
    path = GOLDEN / f"answers_{name}.jsonl"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    if os.environ.get("NANOCHAT_WRITE_GOLDEN"):
        path.write_text(lines, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == lines
    documented = (ROOT / "docs" / "evaluation.md").read_text()
    others = list(rules)[1:]
    if name == "gsm8k":  # each kind of difference is a row of the document's table, with its numbers
        for kind, rows in by_kind(found).items():
            right = Counter({rule: sum(row[rule] for row in rows) for rule in rules})
            if any(row[rule] != row["ours"] for row in rows for rule in others):
                cells = " | ".join(str(right[rule]) for rule in rules)
                assert f"| {kind} | {len(rows)} | {cells} |" in documented
    else:
        cells = " | ".join(str(sum(row[rule] for row in found)) for rule in rules)
        assert f"| {len(found)} | {sum(row['right'] for row in found)} | {cells} |" in documented


def by_kind(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return kinds


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Anna has 5 - 3 = 2 apples.", "2"),
        ("- 5 apples\n- 3 pears", "3"),
        ("It fell from 10 to -3", "-3"),
        ("between 5 and 10-12", "12"),
        ("the F-16", "16"),
        ("It took 2 hours for 1,500.", "1500"),
        ("nothing", None),
    ],
)
def test_the_last_number_of_a_sentence_has_the_sign_that_it_is_read_with(
    text: str, number: str | None
) -> None:
    assert last_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    "text",
    ["1" * 6000, "1," * 3000, "- " * 3000 + "5", "#### " * 2000, "#### " + "the " * 2000, "1e" * 3000,
     "7e99999999", "1/0", "\\frac{" * 1000, "<think>" * 1000, "<|python_start|>" * 500],
)  # fmt: skip
def test_no_answer_makes_a_grader_slow_or_fail(text: str) -> None:
    start = time.process_time()
    marked_number(f"#### {text}")
    last_number(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "text",
    ["(" * 5000, "-" * 5000 + "1", "x = \n" * 999, "def f(\n" * 999, "    x\n" * 999, "'''\n" * 999,
     "`" * 5000, f"def double(x): return {'-' * 3000}x", "\0", "\ud800", "def double(x):\n return '\ud800'"],
)  # fmt: skip
def test_no_answer_makes_the_search_for_a_program_slow_or_fail(text: str) -> None:
    start = time.process_time()
    assert isinstance(complete(PROMPT, "double", text), str)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("close", ["</think>", "</thinking>", "[/THINK]", "◁/think▷", "</seed:think>"])
def test_thoughts_are_no_part_of_an_answer(close: str) -> None:
    opening = close.replace("/", "")
    for text in (f"{opening}4{close} 5", f"4 {close} 5", f" 5{opening}4"):
        assert spoken(text).strip() == "5"
