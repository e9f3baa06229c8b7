"""Reads the numbers in what a model wrote: signs, thousands, decimals, fractions, powers of ten, LaTeX; and
finds the one after `####`."""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from nanochat_core.sources.reasoning import final_answer

LONGEST = 1_000  # characters of a number; Python itself reads no more than 4,300 digits
DASH = r"[-\u2010-\u2015\u2212\ufe63\uff0d]"
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
SPACES = r" \u00a0\u2009\u202f"

# What typesetting puts into a number, and what to read in its place.
TYPESET = (
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|__|`"), ""),  # bold and code, but not 10**4
    (re.compile(r"\{,\}|\\,(?=\d)|，(?=\d)"), ","),  # thousands in LaTeX and in Chinese
    (re.compile(r"\\[dt]?frac(\d)(\d)"), r"\1/\2"),
    (re.compile(rf"\\[dt]?frac\s*\{{\s*({DASH}?\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}"), r"\1/\2"),
    (re.compile(r"⁄"), "/"),
    (re.compile(r"\s?([½⅓⅔¼¾⅕⅛])"), lambda found: f" {VULGAR[found[1]]}"),
    (re.compile(r"(?<=10)[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+"), lambda found: f"^{found[0].translate(SUPERSCRIPTS)}"),
)

NUMBER = re.compile(
    rf"""
    (?:
        (?P<whole>\d{{1,4}})[{SPACES}](?P<part>\d{{1,4}}/\d{{1,4}})(?![\d/])     # 2 1/2
      | (?P<fraction>\d{{1,15}}/\d{{1,15}})(?!\d|[/.,]\d)                       # 3/4, but no date
      | (?P<dotted>                                                              # 1.234.567 and 1.234,5
            [1-9]\d{{0,2}} (?: (?:\.\d{{3}}){{2,}}(?:,\d+)? | \.\d{{3}},\d+ ) ) (?!\d|[.,]\d)
      | (?P<comma>\d+,\d{{1,2}}|0,\d+)(?!\d|,\d)                               # 2,5: a decimal comma
      | (?P<decimal>
            (?: [1-9]\d*(?:,\d{{3}})+(?!\d)                                      # 70,000
              | [1-9]\d?(?:,\d\d)+,\d{{3}}(?!\d)                                 # 1,00,000
              | [1-9]\d{{0,2}}(?:[{SPACES}]\d{{3}})+(?![\d/])                    # 70 000
              | [1-9]\d{{0,2}}(?:['’_]\d{{3}})+(?!\d)                            # 70'000
              | \d+ )
            (?:\.\d+)?
          | (?<![\w.])\.\d+ )
    )
    (?: [eE](?P<power>[-+]?\d{{1,2}})(?![\d.])
      | \s?(?:[×x*·]|\\times|\\cdot)\s?10(?:\^|\*\*)\{{?(?P<tens>{DASH}?\d{{1,2}})\}}?(?!\d) )?
    """,
    re.VERBOSE,
)

# A sign before a number: with only currency and brackets between them, and not between two operands.
SIGN = re.compile(
    rf"""
    (?P<left>\S?)(?P<gap>\s*)
    (?: (?P<dash>{DASH}) | \b(?i:minus|negative)\b )
    (?P<space>\s*)
    (?: \\?[$€£¥₹] | \b[A-Z]{{2,3}}\$? | \\(?:boxed|text|mathbf|left|!) | [*({{\[] | \s )*$
    """,
    re.VERBOSE,
)


class Located(NamedTuple):
    """A number, and where its digits begin in the text it was found in."""

    value: Fraction
    start: int


def plain(text: str) -> str:
    """The text without what typesetting puts into numbers."""
    for pattern, instead in TYPESET:
        text = pattern.sub(instead, text)
    return text


def numbers(text: str) -> Iterator[Located]:
    """The numbers in a `plain` text, from its beginning."""
    for found in NUMBER.finditer(text):
        if len(found[0]) > LONGEST:
            continue
        value = _value(found)
        before = text[max(0, found.start() - 40) : found.start()]
        yield Located(-value if _negative(before) else value, found.start())


def _value(found: re.Match[str]) -> Fraction:
    if found["fraction"]:
        value = _ratio(found["fraction"])
    elif found["whole"]:
        value = Fraction(found["whole"]) + _ratio(found["part"])
    elif found["dotted"]:
        value = Fraction(found["dotted"].replace(".", "").replace(",", "."))
    elif found["comma"]:
        value = Fraction(found["comma"].replace(",", "."))
    else:
        value = Fraction(re.sub(rf"[{SPACES},'’_]", "", found["decimal"]))
    power = found["power"] or found["tens"]
    return value * Fraction(10) ** int(re.sub(DASH, "-", power)) if power else value


def _ratio(text: str) -> Fraction:
    above, below = map(int, text.split("/"))
    return Fraction(above, below) if below else Fraction(above)


def _negative(before: str) -> bool:
    """Whether what comes before a number makes it negative: neither a difference, a range nor a bullet."""
    sign = SIGN.search(before)
    if sign is None:
        return False
    left, gap, space = sign["left"], sign["gap"], sign["space"]
    if sign["dash"] is None:
        return not left.isdigit()  # `12 minus 5`
    if not left or "\n" in gap:
        return not space  # `- 5 apples` on a line of its own is a bullet
    if left.isalpha():
        return bool(gap) and not space  # `is -5`, but not `Answer - 5` or `F-16`
    return not left.isdigit() and left not in ")]}%"


MARK = re.compile(r"(?:\\?#){4,}")
CALLS = re.compile(r"<\|(python|output)_start\|>.*?(?:<\|\1_end\|>|\Z)", re.DOTALL)
# What may stand between the mark and its number: signs, currencies, LaTeX, and words that announce an answer.
LEAD = re.compile(
    r"""
    (?: \\[a-z]+ | [\W_] | (?: US|CA|AU|A|C|S|HK|NZ )?\$ | USD|EUR|GBP|INR|RMB|Rs
      | \b(?: the|my|our|your|final|correct|numerical|answer|result|total|solution|value|thus|so|hence
            |therefore|then|is|are|it|equals|approximately|about|roughly|exactly|minus|negative|x|n )\b )*+
    """,
    re.VERBOSE | re.IGNORECASE,
)


def marked_number(text: str) -> Fraction | None:
    """The number after the first `####` that a number follows, which is GSM8K's rule. If words stand before
    every such number, the first after a mark."""
    text = plain(CALLS.sub("", final_answer(text)))
    marks = [found.span() for found in MARK.finditer(text)]
    ends = [*(start for start, _ in marks[1:]), len(text)]
    loose = None
    for (start, after), end in zip(marks, ends, strict=False):
        found = next(numbers(text[start:end]), None)
        if found is None:
            continue
        if LEAD.fullmatch(text[after : start + found.start]):
            return found.value
        loose = found.value if loose is None else loose
    return loose
