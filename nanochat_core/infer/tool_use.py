"""The calculator that a model may call in the middle of its answer, and what notices such a call."""

import ast
import decimal
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from nanochat_core.tokenizer.bpe import Tokenizer

MAX_CHARS = 256  # of an expression; the longest in GSM8K has 81
MAX_DEPTH = 64  # nested operations
MAX_BITS = 256  # of a numerator or denominator: no result is longer than 77 digits
DIGITS = 10  # significant digits of a result that is not whole, and one after the point at least

# What an expression may be made of, before Python's parser sees it: no names, no exponents, no backslashes.
# Possessive (`++`, `*+`), so that a hostile expression cannot make the match go back over itself.
LEXEMES = re.compile(
    r"""(?: [ ]++ | \d++(?:\.\d*+)? | \.\d++ | '[^'\\\n]*+' | "[^"\\\n]*+" | \.count\b | [-+*/%()] )*+""",
    re.ASCII | re.VERBOSE,
)
THOUSANDS = re.compile(r"(?<=\d),(?=\d)")

BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str | None:
    """Value of `12*3`, `1,200/7` or `'strawberry'.count('r')`, as training data writes it; None if refused.

    Arithmetic is exact, so .1+.2 is 0.3 and .2*50 is 10. Nothing is evaluated by Python: only the forms named
    here have a meaning, and their size is bounded. No signals, no threads: it may be called from anywhere.
    """
    if len(expression) > MAX_CHARS:
        return None
    if "'" not in expression and '"' not in expression:
        expression = THOUSANDS.sub("", expression)
    if not LEXEMES.fullmatch(expression):
        return None
    try:
        tree = ast.parse(expression.strip(" "), mode="eval")
        return _format(_value(tree.body, MAX_DEPTH))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None  # MemoryError is what Python's parser raises for too many parentheses


def _value(node: ast.expr, depth: int) -> Fraction:
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            result = Fraction(repr(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_value(operand, depth - 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            result = _value(operand, depth - 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            result = BINARY[type(op)](_value(left, depth - 1), _value(right, depth - 1))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            result = Fraction(text.count(part))
        case _:
            raise ValueError(f"{type(node).__name__} has no meaning here")
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise ValueError("too large")
    return result


def _format(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    whole = len(str(abs(value.numerator) // value.denominator))
    quotient = decimal.Context(prec=max(DIGITS, whole + 1)).divide(
        decimal.Decimal(value.numerator), decimal.Decimal(value.denominator)
    )
    text = f"{quotient:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class ToolCalls:
    """Follows the tokens of one answer and says what has to be written after a finished call."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = tokenizer.special("<|python_start|>")
        self._end = tokenizer.special("<|python_end|>")
        self._output_start = tokenizer.special("<|output_start|>")
        self._output_end = tokenizer.special("<|output_end|>")
        self._call: list[int] | None = None

    def follow(self, token: int) -> list[int]:
        """Tokens to be forced in after this one: the tool's output, or nothing."""
        if token == self._start:
            self._call = []
        elif self._call is not None:
            if token != self._end:
                self._call.append(token)
                return []
            expression, self._call = self._tokenizer.decode(self._call), None
            result = calculate(expression)
            if result is not None:
                return [self._output_start, *self._tokenizer.encode(result), self._output_end]
        return []
