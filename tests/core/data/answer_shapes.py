"""Shapes in which chat models put their answers: what surrounds one right or wrong number, or one program."""

# ruff: noqa: E501 (a shape is easier to see on one line)

import itertools
import textwrap
from collections.abc import Iterator
from typing import NamedTuple


class Shape(NamedTuple):
    """An answer, the truth it is held to, and whether a reader would count it as right."""

    kind: str
    answer: str
    truth: str
    right: bool


# {n} is the number as it is, {c} with commas, {m} with a minus that is not ASCII, {a} without its sign.
NUMBERS: dict[str, tuple[str, ...]] = {
    "as the data has it": ("#### {n}", "So it is.\n#### {c}", "#### {n}\n", "#### {c} ", "x\n\n#### {n}\n\n"),
    "words after the number": (
        "#### {c} dollars in 2 years",
        "#### {n} apples",
        "#### {c} (3 x 6)",
        "#### {n}, not 7",
        "#### {n}; 12 were eaten",
        "#### {n} or 3",
    ),
    "several marks": (
        "#### {n}\n#### 7",
        "#### {c}\n\n#### {c}",
        "#### Step 1: add\n#### Step 2: divide\n#### {n}",
    ),
    "a dot at the end": ("#### {n}.", "#### {c}.\n", "#### {n}. It took 2 hours.", "#### {c}!", "#### {n}..."),
    "decimals that say nothing": ("#### {n}.0", "#### {c}.00", "#### {n}.00."),
    "currency": ("#### ${a}", "#### {s}${c}", "#### €{a}", "#### {n} USD", "#### USD {a}", "#### Rs. {a}",
                 "#### US${a}", "#### \\${a}", "#### {a}€", "#### $ {a}"),
    "units": ("#### {n}%", "#### {n} %", "#### {n}km", "#### {n}/day", "#### {n} m2", "#### {n}-ish"),
    "bold, code and brackets": ("#### **{n}**", "**#### {c}**", "#### `{n}`", "#### *{n}*", "#### [{n}]",
                                "#### ({n})", "#### __{n}__", "#### <{n}>", '#### "{n}"', "#### **{c}** dollars"),
    "LaTeX": ("#### \\boxed{{{n}}}", "#### $\\boxed{{{c}}}$", "#### ${n}$", "#### \\({n}\\)", "#### $${n}$$",
              "#### \\[ {n} \\]", "#### \\text{{{n}}}", "#### {l}"),
    "words before the number": ("#### Answer: {n}", "#### The answer is {c}", "#### = {n}", "#### Final answer: **{n}**",
                                "#### x = {n}", "#### approximately {n}", "#### Anna has {n} apples", "#### ≈ {c}"),
    "spaces and line ends": ("####{n}", "####  {n}", "####\t{n}", "####\n{c}", "####\n\n{n}", "####\r\n{n}\r\n",
                             "#### \u00a0{n}", "##### {n}", "\\#\\#\\#\\# {n}"),
    "thoughts and calls": (
        "<think>Perhaps #### 7</think>\n#### {n}",
        "I guess #### 7</think>#### {c}",
        "#### <|python_start|>{n}*1<|python_end|><|output_start|>{n}<|output_end|>{n}",
        "<|python_start|>4*2<|python_end|><|output_start|>8<|output_end|>\n#### {n}<|assistant_end|>",
    ),
    "other digits and separators": ("#### {f}", "#### {t}", "#### {q}", "#### {w}"),
    "powers of ten": ("#### {e}", "#### {p}"),
    "no mark": ("{n}", "The answer is {c}.", "\\boxed{{{n}}}", "### {n}", "# {n}", "Answer: {n}"),
    "no number": ("####", "#### ", "#### none", "I do not know", "#### ten"),
    "another number": ("#### {o}", "#### {o} and not {n}", "#### {n}1", "#### 1{a}", "{n}\n#### {o}", "#### {n}.5",
                       "#### {o}\n#### {n}", "#### 0.{a}", "#### {a}/7"),
}  # fmt: skip
SIGNS = ("#### {m}", "#### - {a}", "#### -${a}", "#### $-{a}", "#### **-{a}**", "#### \\boxed{{-{a}}}", "#### minus {a}",
         "#### negative {a}", "#### -\\${a}", "#### Answer: - {a}", "#### x = -{a}", "#### –{a}", "#### (-{a})")  # fmt: skip
LOST_SIGNS = ("#### {a}", "#### {a}-", "#### Answer - {a}", "#### 0-{a}")
FRACTIONS = (("0.75", ("3/4", "\\frac{3}{4}", "\\dfrac{3}{4}", "\\frac34", "¾", ".75", "0,75", "0.750", "$.75", "0.75.")),
             ("2.5", ("2,5", "2 1/2", "2½", "5/2", "2.50", "$2.50", "\\frac{5}{2}", "2,50 €", "25/10")),
             ("-1.5", ("-3/2", "−1.5", "-1,5", "-\\frac{3}{2}", "\\frac{-3}{2}", "-1 1/2", "-$1.50")))  # fmt: skip
NOT_FRACTIONS = (
    ("3", ("3/4", "3,5", "2.5")),
    ("25", ("2,5", "2.5")),
    ("123", ("1,2,3",)),
    ("510", ("5,10",)),
)


def numbers() -> Iterator[Shape]:
    """Answers to questions whose answer is a number."""
    for truth in ("18", "70000", "1234567", "-45"):
        value = int(truth)
        size = f"{abs(value)}"
        minus = "-" if value < 0 else ""
        mantissa, power = f"{abs(value):.6e}".split("e")
        forms = {
            "n": truth, "c": f"{value:,}", "a": size, "s": minus, "o": str(value + 13),
            "m": truth.replace("-", "−"),
            "f": truth.translate(str.maketrans("0123456789", "０１２３４５６７８９")),
            "t": f"{value:,}".replace(",", " "), "q": f"{value:,}".replace(",", "'"),
            "w": f"{value:,}".replace(",", "\u202f"), "l": f"{value:,}".replace(",", "{,}"),
            "e": f"{minus}{mantissa}e{int(power)}", "p": f"{minus}{mantissa} \\times 10^{{{int(power)}}}",
        }  # fmt: skip
        wrong = ("no mark", "no number", "another number")
        for kind, templates in NUMBERS.items():
            for template in templates:
                # Currency before a number leaves no room for its sign: those of {s} and after it keep it.
                if minus and "{a}" in template and kind != "another number":
                    continue
                yield Shape(kind, template.format(**forms), truth, kind not in wrong)
        if minus:
            yield from (Shape("signs", template.format(**forms), truth, True) for template in SIGNS)
            yield from (Shape("another number", shape.format(**forms), truth, False) for shape in LOST_SIGNS)
    for truth, ways in FRACTIONS:
        yield from (Shape("fractions and decimal commas", f"#### {way}", truth, True) for way in ways)
    for truth, ways in NOT_FRACTIONS:
        yield from (Shape("a part of a number", f"#### {way}", truth, False) for way in ways)


PROMPT = '''\
import math
from typing import List


def one() -> int:
    """What one is."""
    return 1


def double(values: List[int]) -> List[int]:
    """Double each value.

    >>> double([1, 2])
    [2, 4]
    """
'''
BODY = "    return [2 * value for value in values]\n"
SIGNATURE = "def double(values: List[int]) -> List[int]:\n"
DOCSTRING = '    """Double each value.\n\n    >>> double([1])\n    [2]\n    """\n'
PLAIN = SIGNATURE + BODY

PROGRAMS = {
    "plain": PLAIN,
    "with its docstring": SIGNATURE + DOCSTRING + BODY,
    "the whole prompt": PROMPT + BODY,
    "a helper first": "def twice(value):\n    return 2 * value\n\n\n"
    "def double(values):\n    return [twice(value) for value in values]\n",
    "a helper last": "def double(values):\n    return list(map(twice, values))\n\n\ndef twice(value):\n    return 2 * value\n",
    "the prompt's helper": "def double(values):\n    return [(one() + one()) * value for value in values]\n",
    "imports and a constant": "import itertools\n\nFACTOR = 2\n\ndef double(values):\n    return [FACTOR * v for v in values]\n",
    "the future": "from __future__ import annotations\n\n" + PLAIN,
    "tabs": "def double(values):\n\tdone = []\n\tfor value in values:\n\t\tdone.append(2 * value)\n\treturn done\n",
    "a class": "class Solution:\n    def double(self, values):\n        return [2 * value for value in values]\n",
    "fences in its docstring": SIGNATURE
    + '    """Double.\n\n    ```\n    double([1])\n    ```\n    """\n'
    + BODY,
    "an example": PLAIN + "\n# Example\nprint(double([1, 2]))\n",
    "a wrong test of its own": PLAIN + "\nassert double([1]) == [3]\n",
    "a main": PLAIN + '\nif __name__ == "__main__":\n    print(double(list(map(int, input().split()))))\n',
    "a lambda": "double = lambda values: [2 * value for value in values]\n",
    "only the body": BODY,
    "the body without its indentation": textwrap.dedent(BODY),
    "the body, the first line's indentation lost": "done = [2 * value for value in values]\n    return done\n",
}
WRONG = {
    "wrong": PLAIN.replace("2 *", "3 *"),
    "a stub": SIGNATURE + DOCSTRING + "    pass\n",
    "broken": PLAIN + "    retrun values\n",
    "another name": PLAIN.replace("double", "twice"),
    "no program": "I cannot write this.\n",
    "leaves": "raise SystemExit(0)\n",
}
AROUND = {
    "a fence": "```python\n{}```",
    "py": "```py\n{}```",
    "Python": "```Python\n{}```",
    "python3": "```python3\n{}\n```\n",
    "no language": "```\n{}```",
    "a title": '```python title="double.py"\n{}```',
    "a file name": "```python:double.py\n{}```",
    "braces": "```{{python}}\n{}```",
    "tildes": "~~~python\n{}~~~",
    "four": "````python\n{}````",
    "bare": "{}",
    "only a closing fence": "{}```\nIt doubles each value.",
    "only an opening fence": "```python\n{}",
    "a closing fence on the last line": "```python\n{r}```",
    "prose around a fence": "Sure! Here's the function:\n\n```python\n{}```\n\nIt's simple: O(n). Let me know!",
    "prose around bare code": "Here is what you asked for.\n\n{}\nExplanation: it doubles, that's all.",
    "a shell block first": "```bash\npip install numpy\n```\n\n```python\n{}```",
    "an output block after": "```python\n{}```\nOutput:\n```\n[2, 4]\n```",
    "usage first": "Use it so:\n```python\nfrom double import double\nprint(double([1]))\n```\nIt is:\n```python\n{}```",
    "in a list": "1. Write this:\n\n   ```python\n{i}   ```\n2. Done.",
    "thoughts": "<think>\n```python\ndef double(values):\n    return values\n```\nNo.\n</think>\n```python\n{}```",
    "tags": "<pre><code>\n{}</code></pre>",
    "PYTHON": "[PYTHON]\n{}[/PYTHON]",
    "LaTeX": "\\begin{{lstlisting}}[language=Python]\n{}\\end{{lstlisting}}",
    "a heading": "### Solution\n\n{}\n### Complexity\n\n- time: O(n)\n- space: O(n)",
    "the language alone": "python\n{}",
    "CRLF": "\r\n",
    "blanks that do not break": "\u00a0",
    "quoted": "> ",
}


OFTEN = ("a fence", "bare", "prose around a fence", "prose around bare code", "in a list", "a closing fence on the last line",
         "CRLF", "usage first")  # fmt: skip


def programs() -> Iterator[Shape]:
    """Answers to a question whose answer is a program."""
    every = itertools.product(AROUND.items(), (PROGRAMS | WRONG).items())
    for (around, template), (kind, code) in every:
        if around not in OFTEN and kind not in ("plain", "a helper last", "only the body", "wrong", "broken"):
            continue
        if around == "CRLF":
            answer = f"```python\n{code}```".replace("\n", "\r\n")
        elif around == "blanks that do not break":
            answer = f"```python\n{code.replace('    ', 4 * template)}```"
        elif around == "quoted":
            answer = textwrap.indent(f"```python\n{code}```", template, lambda line: True)
        else:
            answer = template.format(code, r=code.rstrip(), i=textwrap.indent(code, "   "))
        yield Shape(f"{around}, {kind}", answer, "", kind not in WRONG)
    yield from (Shape(kind, answer, "", True) for kind, answer in ODD.items())


ODD = {
    "an interpreter": ">>> def double(values):\n...     return [2 * value for value in values]\n...\n>>> double([1])\n[2]",
    "a notebook": "In [1]: def double(values):\n   ...:     return [2 * value for value in values]\n",
    "numbered lines": "1 def double(values):\n2     return [2 * value for value in values]\n",
    "a diff": "```diff\n+def double(values):\n+    return [2 * value for value in values]\n```",
    "on the fence's line": "```python def double(values): return [2 * value for value in values]```",
    "another name for it": "def twice(values):\n    return [2 * v for v in values]\n\ndouble = twice\n",
    "in a sentence": "Use `double = lambda values: [2 * value for value in values]` for that.",
    "escaped": "<code>def double(values):\n    return [2 * v if v &lt; 9 else v + v for v in values]</code>",
    "a helper in a block before": "```python\ndef twice(value):\n    return 2 * value\n```\nWith it:\n```python\n"
    "def double(values):\n    return [twice(value) for value in values]\n```",
    "a helper in a block after": "```python\ndef double(values):\n    return [twice(value) for value in values]\n```\n"
    "where\n```python\nfrom operator import mul\n\ndef twice(value):\n    return mul(2, value)\n```",
    "a stub and the body": f"```python\n{SIGNATURE}{DOCSTRING}```\nThe body:\n```python\n{BODY}```",
    "a stub and the function": f"```python\n{PROMPT}    pass\n```\nbecomes\n```python\n{PLAIN}```",
    "fences at the margin of a docstring": f'````python\n{SIGNATURE}    """Double.\n```\ndouble([1])\n```\n"""\n{BODY}````',
    "the body after prose": f"The body of the function is:\n\n{BODY}\nThat is all.",
    "the body with branches": "    if not values:\n        return []\n    else:\n        return [2 * v for v in values]\n",
    "cut off in a second function": f"```python\n{PLAIN}\n\ndef test(values):\n    for value in",
    "two versions": f"```python\n{PLAIN}```\nor\n```python\n{PLAIN.replace('2 *', '3 *')}```",
}
