"""What the tokenizer's tests share: strategies for awkward texts, and the slow twin of the trainer."""

from collections import Counter
from itertools import pairwise

from hypothesis import strategies as st
from nanochat_bpe import Splitter

# Every alternative of the pattern, its borders, and characters that only look like a case of it.
AWKWARD = (
    "abstdmlvreSTDMLVRExK'’ſ'' \t\n\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000\u200b\ufeff"
    ".,!-_/\\{}1234567890½²Ⅷ٣é\u0301\u0308ÄßİKคำไทย한글中文日本語عربيةहिन्दी👍🏽\u200d👩🇰🇷\x00"
)
awkward = st.text(st.sampled_from(AWKWARD), max_size=60)
anything = st.text(max_size=60)  # all of Unicode but surrogates
repeats = st.builds(lambda text, n: text * n, st.text(st.sampled_from("ab x'1 \n한"), min_size=1, max_size=3),
                    st.integers(1, 200))  # fmt: skip
texts = st.lists(st.one_of(awkward, anything, repeats), min_size=1, max_size=20)

Merge = tuple[int, int]


def slow_merges(documents: list[str], vocab_size: int) -> list[Merge]:
    """Byte pair encoding as it is defined: count all pairs, merge the best, begin again."""
    splitter = Splitter(regex=True)
    counts = Counter(word for text in documents for word in splitter.split(text))
    words = {word: list(word.encode()) for word in counts}
    merges: list[Merge] = []
    while 256 + len(merges) < vocab_size:
        pairs: Counter[Merge] = Counter()
        for word, ids in words.items():
            for pair in pairwise(ids):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {word: merged(ids, best, 256 + len(merges)) for word, ids in words.items()}
        merges.append(best)
    return merges


def merged(ids: list[int], pair: Merge, new: int) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out
