"""The calculator: what it answers, how it writes it, and what it refuses without spending time or memory."""

import ast
import decimal
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core.infer.tool_use import LEXEMES, MAX_CHARS, calculate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12*3", "36"),
        (".2*50", "10"),
        ("48/2", "24"),
        ("5/2", "2.5"),
        ("1,200+2,300", "3500"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.3333333333"),
        ("-(2+3)*4", "-20"),
        ("+7", "7"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        ("7%3", "1"),
        (" 2 * ( 3 + 4 ) ", "14"),
        ("100.", "100"),
        ("1/8", "0.125"),
        ("'strawberry'.count('r')", "3"),
        ('"it\'s".count("s")', "1"),
        ("'a,b,c'.count(',')", "2"),
        ("'banana'.count('an')+1", "3"),
        ("10000000000*10000000000", "100000000000000000000"),
        ("50000000001/2", "25000000000.5"),
        ("10000000000/3", "3333333333.3"),
        ("999999999.96+0", "1000000000"),
    ],
)
def test_the_calculator_answers_as_the_training_data_does(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "   ",
        "2**8",
        "9" * 5000,
        "1/0",
        "7%0",
        "7//0",
        "'a'.center(300000000).count('a')",
        "'a'*10000000000",
        "('a'*10000000000).count('a')",
        "'x' or signal.count('a')",
        "__import__('os').system('true')",
        "().__class__.__bases__",
        "'a'.count",
        "'a'.count('a', 0)",
        "'a'.count(sub='a')",
        "'a'.count(1)",
        "'abc'.upper()",
        "'a'",
        "'a'+'b'",
        "[1][0]",
        "1e400",
        "1e5",
        "1j",
        "0x10",
        "True",
        "1_000",
        "lambda: 1",
        "2;3",
        "2\n+3",
        "'\\x41'.count('A')",
        "f'{1}'.count('1')",
        "1 if 1 else 2",
        "1<2",
        "~1",
        "x=1",
        "1()",
        "1.count('a')",
        "٣+٤",
        "(" * 128 + "1" + ")" * 127,
        "-" * 200 + "1",
        "+1" * 100,
        "*".join(["99999999"] * 20),
        "\0",
    ],
)
def test_the_calculator_refuses_everything_else(expression: str) -> None:
    assert calculate(expression) is None


def test_hostile_expressions_cost_neither_time_nor_memory() -> None:
    hostile = [
        "9" * 255 + "x",
        "'" * 255,
        "1 " * 127 + "x",
        "(" * 256,
        "*".join(["9" * 20] * 12),
        "%".join(["9" * 60] * 4),
        "/".join(["7.77777"] * 30),
        "1+" * 10_000_000 + "1",
    ]
    tracemalloc.start()
    start = time.perf_counter()
    for expression in hostile:
        calculate(expression)
    assert time.perf_counter() - start < 0.2
    assert tracemalloc.get_traced_memory()[1] < 4_000_000 + len(hostile[-1])
    tracemalloc.stop()


def test_the_calculator_works_on_any_thread() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(calculate, ["2+2"] * 32)) == ["4"] * 32


@given(st.text(alphabet="0123456789.,+-*/%() '\"acount", max_size=40))
def test_any_text_gives_a_short_result_or_none(expression: str) -> None:
    result = calculate(expression)
    assert result is None or len(result) < 100


@given(st.lists(st.integers(0, 999), min_size=1, max_size=6), st.data())
def test_whole_number_arithmetic_agrees_with_python(numbers: list[int], data: st.DataObject) -> None:
    operators = data.draw(
        st.lists(st.sampled_from("+-*"), min_size=len(numbers) - 1, max_size=len(numbers) - 1)
    )
    expression = str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(operators, numbers[1:], strict=True))
    assert calculate(expression) == str(eval(compile(ast.parse(expression, mode="eval"), "", "eval")))


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**12))
def test_a_quotient_is_right_to_ten_digits_and_to_a_tenth(above: int, below: int) -> None:
    exact = Fraction(above, below)
    result = calculate(f"{above}/{below}")
    assert result is not None
    assert abs(Fraction(result) - exact) <= min(abs(exact) * Fraction(1, 10**9), Fraction(1, 20))
    assert (Fraction(result) == exact) or "." in result or abs(exact) > 10**8


@given(st.integers(-(10**9) + 1, 10**9 - 1), st.integers(1, 999))
def test_quotients_below_a_thousand_million_are_written_as_ever(above: int, below: int) -> None:
    exact = Fraction(above, below)
    ten = decimal.Context(prec=10).divide(decimal.Decimal(above), decimal.Decimal(below))
    written = str(exact) if exact.denominator == 1 else f"{ten:f}".rstrip("0").rstrip(".")
    assert calculate(f"{above}/{below}") == written


def test_the_bound_on_size_is_checked_before_the_text_is_read() -> None:
    assert LEXEMES.fullmatch("1" * (MAX_CHARS + 1)) and calculate("1" * (MAX_CHARS + 1)) is None
