"""Speed of CORE's three kinds, ours beside one example at a time as nanochat has it, on the same examples.

    uv run python benchmarks/core_eval.py [--examples N] [--rounds N] [--json]

The peer stacks the candidates of one example into a batch and takes the logits of every position. Both answer
the same questions with the same weights, random ones of a d4 with nanochat's vocabulary; the answers are
compared, and a ratio is the median over the rounds, in which the two take turns. One thread.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from nanochat_core.data import bundle, corpus
from nanochat_core.eval import core
from nanochat_core.model.gpt import GPT
from nanochat_core.model.shape import GPTConfig
from nanochat_core.tokenizer.bpe import Tokenizer, train

SHOTS = {"multiple_choice": 10, "schema": 5, "language_modeling": 5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=40, help="of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=65_536, help="of the model")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train(list(corpus.factbook_sections())[::4], 8_192)
    model = d4(args.vocab_size)
    found: dict[str, float | int] = {"vocab_size": args.vocab_size, "examples": args.examples}
    print(f"{'kind':<20} {'one at a time':>14} {'ours':>10} {'ratio':>7}  same answers")
    for made in bundle.tasks():
        if made.label not in ("factbook_labels", "factbook_whose_capital", "factbook_units"):
            continue
        kind: core.Kind = made.kind  # type: ignore[assignment]
        task = core.IclTask(made.label, kind, Path(), SHOTS[kind], " ", made.chance / 100)
        examples = random.Random(0).sample(made.examples, min(args.examples, len(made.examples)))
        slow, fast, ratios = [], [], []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            alone = one_at_a_time(model, tokenizer, task, examples)
            between = time.perf_counter()
            ours = core.evaluate(model, tokenizer, task, examples, context=2048)
            end = time.perf_counter()
            slow.append(len(examples) / (between - begin))
            fast.append(len(examples) / (end - between))
            ratios.append(fast[-1] / slow[-1])
        same = sum(a == outcome.correct for a, outcome in zip(alone, ours, strict=True))
        ratio = statistics.median(ratios)
        print(
            f"{kind:<20} {statistics.median(slow):>12.1f}/s {statistics.median(fast):>8.1f}/s {ratio:>6.2f}x"
            f"  {same}/{len(examples)}",
            flush=True,
        )
        found |= {f"{kind}_ratio": ratio, f"{kind}_per_s": statistics.median(fast), f"{kind}_same": same}
    if args.json:
        print(json.dumps(found))


def d4(vocab_size: int) -> GPT:
    shape = GPTConfig("seed", 2048, vocab_size, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
    model = GPT(shape).init_weights(0).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=rng) / weight.size(1) ** 0.5)
    return model


@torch.no_grad()
def one_at_a_time(
    model: nn.Module, tokenizer: Tokenizer, task: core.IclTask, examples: Sequence[core.Example]
) -> list[bool]:
    """Whether each example is answered right: one forward pass for each, all logits, losses by span."""
    right = []
    for i, example in enumerate(examples):
        texts = core.prompts(task, example, core.shown(task, examples, i))
        ids = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
        spans = core.candidates(task.kind, ids, 2048)
        T = max(len(span.tokens) for span in spans)
        idx = torch.tensor([span.tokens + [tokenizer.bos] * (T - len(span.tokens)) for span in spans])
        logits = model(idx)
        nll = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="none"
        ).view(len(spans), -1)
        if task.kind == "language_modeling":
            span = slice(spans[0].start - 1, spans[0].end - 1)
            right.append(bool((logits[0, :-1].argmax(-1)[span] == idx[0, 1:][span]).all()))
        else:
            losses = [nll[j, s.start - 1 : s.end - 1].mean().item() for j, s in enumerate(spans)]
            right.append(losses.index(min(losses)) == example["gold"])
    return right


if __name__ == "__main__":
    main()
