"""Speed of CORE's three kinds, ours beside one example at a time as nanochat has it, and beside lm-eval.

    uv run --group bench python benchmarks/core_eval.py [--examples N] [--rounds N] [--peer alone] [--json]

The first peer stacks the candidates of one example into a batch and takes the logits of every position. The
second is lm-eval's Hugging Face backend, given the same texts as loglikelihood requests and the same weights,
exported as transformers' NanoChat, at several batch sizes; our own harness over that same transformers model
stands beside it. Random weights of a d4 with nanochat's vocabulary. The answers are compared, and a ratio is
the median over the rounds, in which all take turns. One thread.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanochat_core.eval import core
from nanochat_core.eval.subject import from_transformers
from nanochat_core.infer.exported import export
from nanochat_core.model.gpt import GPT, write_config
from nanochat_core.model.shape import GPTConfig
from nanochat_core.sources import bundle, corpus
from nanochat_core.tokenizer.bpe import Tokenizer, train
from nanochat_core.train.checkpoint import save_model

SHOTS = {"multiple_choice": 10, "schema": 5, "language_modeling": 5}


BATCHES = (1, 8, 32)  # of lm-eval; on a CPU more does not always mean faster
LABELS = ("factbook_labels", "factbook_whose_capital", "factbook_units")

Answer = Callable[[core.IclTask, Sequence[core.Example]], list[bool]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=40, help="of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=65_536, help="of the model")
    parser.add_argument("--peer", choices=("both", "alone"), default="both", help="alone: without lm-eval")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train(list(corpus.factbook_sections())[::4], 8_192)
    model = d4(args.vocab_size)
    ways: dict[str, Answer] = {
        "ours": lambda task, examples: [
            outcome.correct for outcome in core.evaluate(model, tokenizer, task, examples, context=2048)
        ],
        "one at a time": lambda task, examples: one_at_a_time(model, tokenizer, task, examples),
    }
    if args.peer == "both":
        ways |= over_transformers(model, tokenizer)
    found: dict[str, float | int] = {"vocab_size": args.vocab_size, "examples": args.examples}
    print(f"{'kind':<20} {'way':<26} {'examples/s':>10} {'ours is':>9}  same answers")
    tasks = {made.label: made for made in bundle.tasks()}
    for made in (tasks[label] for label in LABELS):
        kind: core.Kind = made.kind  # type: ignore[assignment]
        task = core.IclTask(made.label, kind, Path(), SHOTS[kind], " ", made.chance / 100)
        examples = random.Random(0).sample(made.examples, min(args.examples, len(made.examples)))
        took: dict[str, list[float]] = {name: [] for name in ways}
        answers: dict[str, list[bool]] = {}
        for _ in range(args.rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                answers[name] = way(task, examples)
                took[name].append(time.perf_counter() - begin)
        for name, seconds in took.items():
            ratio = statistics.median(s / o for s, o in zip(seconds, took["ours"], strict=True))
            same = sum(a == b for a, b in zip(answers[name], answers["ours"], strict=True))
            speed = len(examples) / statistics.median(seconds)
            against = "" if name == "ours" else f"{ratio:>8.2f}x  {same}/{len(examples)}"
            print(f"{kind:<20} {name:<26} {speed:>10.1f} {against}", flush=True)
            key = f"{kind}/{name}"
            found |= {f"{key}/per_s": speed, f"{key}/ratio": ratio, f"{key}/same": same}
    if args.json:
        print(json.dumps(found))


def over_transformers(model: GPT, tokenizer: Tokenizer) -> dict[str, Answer]:
    """Our harness and lm-eval's over the same weights as transformers holds them."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        print(f"without lm-eval: {error} (uv pip install 'lm-eval[hf]')")
        return {}
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        at, exported = Path(folder) / "stage", Path(folder) / "exported"
        at.mkdir()
        tokenizer.save(at)
        write_config(at, model.config, tokenizer.fingerprint)
        save_model(at, model)
        export(at, at, exported, results={}, name="d4")
        subject = from_transformers(str(exported), torch.device("cpu"))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
        words = transformers.AutoTokenizer.from_pretrained(exported)
    lm: Any = HFLM(theirs, tokenizer=words, device="cpu", batch_size=1, add_bos_token=True)

    def ours(task: core.IclTask, examples: Sequence[core.Example]) -> list[bool]:
        outcomes = core.evaluate(subject.model, subject.tokenizer, task, examples, context=2048)
        return [outcome.correct for outcome in outcomes]

    def lm_eval(size: int) -> Answer:
        def way(task: core.IclTask, examples: Sequence[core.Example]) -> list[bool]:
            lm.batch_size_per_gpu = size
            pairs = [asked(task, examples, i) for i in range(len(examples))]
            requests = [
                Instance("loglikelihood", {}, pair, n)
                for n, pair in enumerate(p for group in pairs for p in group)
            ]
            scored = iter(lm.loglikelihood(requests, disable_tqdm=True))
            right = []
            for example, group in zip(examples, pairs, strict=True):
                mine = [next(scored) for _ in group]
                if task.kind == "language_modeling":
                    right.append(bool(mine[0][1]))
                else:  # by the mean, as CORE has it
                    means = [s[0] / len(words.encode(pair[1])) for s, pair in zip(mine, group, strict=True)]
                    right.append(means.index(max(means)) == example["gold"])
            return right

        return way

    return {"ours over transformers": ours} | {
        f"lm-eval, {size} at a time": lm_eval(size) for size in BATCHES
    }


def asked(task: core.IclTask, examples: Sequence[core.Example], i: int) -> list[tuple[str, str]]:
    """An example as lm-eval wants it: what is given, and what its likelihood is asked of."""
    example, before = examples[i], core.shown(task, examples, i)
    if task.kind == "multiple_choice":
        ends = [f"{task.delimiter}{choice}" for choice in example["choices"]]
    elif task.kind == "schema":
        ends = [f"{task.delimiter}{example['continuation']}"] * len(example["context_options"])
    else:
        ends = [f"{task.delimiter}{example['continuation']}"]
    texts = core.prompts(task, example, before)[-len(ends) :]
    return [(text.removesuffix(end), end) for text, end in zip(texts, ends, strict=True)]


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
