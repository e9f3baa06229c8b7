"""Numbers that others have published for these recipes, and from where: what a run is set beside."""

from collections.abc import Iterable
from typing import NamedTuple

# What CORE is the mean of (https://arxiv.org/abs/2406.11794); over others it is another number.
CORE_TASKS = frozenset(
    {
        "agi_eval_lsat_ar",
        "arc_challenge",
        "arc_easy",
        "bigbench_cs_algorithms",
        "bigbench_dyck_languages",
        "bigbench_language_identification",
        "bigbench_operators",
        "bigbench_qa_wikidata",
        "bigbench_repeat_copy_logic",
        "boolq",
        "commonsense_qa",
        "copa",
        "coqa",
        "hellaswag",
        "hellaswag_zeroshot",
        "jeopardy",
        "lambada_openai",
        "openbook_qa",
        "piqa",
        "squad",
        "winograd",
        "winogrande",
    }
)
GPT2_CORE = 0.256525  # GPT-2 1.5B, 2019, by the same 22 tasks


def core_name(tasks: Iterable[str]) -> str:
    """What the mean over these tasks may be called."""
    return "CORE" if set(tasks) >= CORE_TASKS else "CORE (own tasks)"


class Published(NamedTuple):
    """One published run."""

    what: str
    source: str
    numbers: dict[str, float]  # by the report's own keys


D20 = (
    Published(
        "d20 speedrun, 13 October 2025",
        "nanochat discussion 1",
        {
            "base/core": 0.2219,
            "mid/arc_easy": 0.3561,
            "sft/arc_easy": 0.3876,
            "mid/arc_challenge": 0.2875,
            "sft/arc_challenge": 0.2807,
            "mid/mmlu": 0.3111,
            "sft/mmlu": 0.3151,
            "mid/gsm8k": 0.0250,
            "sft/gsm8k": 0.0455,
            "rl/gsm8k": 0.0758,
            "mid/humaneval": 0.0671,
            "sft/humaneval": 0.0854,
        },
    ),
    Published(
        "d20, 8xH100, 12 December 2025",
        "a public report of the speedrun with SpellingBee",
        {
            "base/core": 0.2096,
            "base/val_bpb": 0.8121,
            "mid/arc_easy": 0.4440,
            "sft/arc_easy": 0.4415,
            "mid/arc_challenge": 0.3003,
            "sft/arc_challenge": 0.3072,
            "mid/mmlu": 0.3312,
            "sft/mmlu": 0.3267,
            "mid/gsm8k": 0.0379,
            "sft/gsm8k": 0.0682,
            "mid/humaneval": 0.0915,
            "sft/humaneval": 0.0915,
            "mid/spellingbee": 0.9844,
            "sft/spellingbee": 0.9922,
            "mid/chatcore": 0.2580,
            "sft/chatcore": 0.2643,
        },
    ),
    Published("GPT-2 1.5B, 2019", "the leaderboard's mark", {"base/core": GPT2_CORE}),
)


class Expected(NamedTuple):
    """What a profile of ours should come to on the machine it is named after."""

    core: str  # one identical run differs from the next by up to .0165
    rates: tuple[float, float]  # FLOP/s of one GPU in training, as others measured it
    reason: str


EXPECTED = {
    "dgx-spark": Expected("0.22 (projected)", (45e12, 62e12), "six public nanochat runs on a GB10"),
    "dgx-spark-x2": Expected("0.22 (projected)", (44e12, 61e12), "the same, two nodes scaling 1.96 times"),
    "dgx-spark-seed": Expected("0.20 to 0.22", (45e12, 50e12), "the two reports of nine and ten days"),
    "speedrun-8xh100": Expected("0.20 to 0.22", (440e12, 480e12), "three published runs, MFU 48%"),
    "run1000": Expected("about 0.31", (490e12, 510e12), "the published run, MFU 51%"),
}
