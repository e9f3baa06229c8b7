"""Decoding speed of our engine beside transformers' NanoChat `generate`: same weights, prompts and tokens.

    uv run python benchmarks/decode.py [--depth 4] [--threads 2] [--json]

Both have a KV cache and decode greedily, one stream and 16. They take turns, and a ratio is the median
over the rounds, so that what else the machine does falls on both alike. The model is of the `seed` preset,
with random weights (speed does not depend on what it has learned), and reaches transformers through our
export. The tokens of both are compared before anything is measured.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat_core.infer.engine import Engine
from nanochat_core.infer.exported import export
from nanochat_core.infer.sampling import Sampling
from nanochat_core.model.gpt import GPT, load_model, write_config
from nanochat_core.model.shape import GPTConfig
from nanochat_core.tokenizer.bpe import Tokenizer

Generate = Callable[[list[list[int]], int], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    """Both engines in turn at both widths, the table, and the line of JSON."""
    ours, theirs = prepare(args, folder)
    generator = torch.Generator().manual_seed(1)
    shape = (16, args.prompt)
    prompts: list[list[int]] = torch.randint(0, args.vocab_size - 9, shape, generator=generator).tolist()
    speeds: dict[tuple[str, int], list[float]] = {}
    for streams in (1, 16):
        some = prompts[:streams]
        agree = agreement(ours(some, 16), theirs(some, 16))
        if args.dtype == "float32" and agree < 1:
            raise SystemExit(f"the tokens differ: {agree:.0%} agree; a speed would mean nothing")
        for _ in range(args.rounds):
            for name, generate in (("ours", ours), ("transformers", theirs)):
                start = time.perf_counter()
                answers = generate(some, args.tokens)
                seconds = time.perf_counter() - start
                assert all(len(answer) == args.tokens for answer in answers)
                speeds.setdefault((name, streams), []).append(streams * args.tokens / seconds)

    def ratio(streams: int) -> float:
        pairs = zip(speeds["ours", streams], speeds["transformers", streams], strict=True)
        return statistics.median(mine / peer for mine, peer in pairs)

    print(f"d{args.depth}, vocabulary {args.vocab_size:,}, {args.dtype}, {args.threads} threads,", end=" ")
    print(f"{args.prompt} tokens read and {args.tokens} made per stream; tokens/s")
    print(f"{'streams':>8}{'ours':>12}{'transformers':>14}{'ratio':>8}")
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    for streams in (1, 16):
        mine, peer = medians["ours", streams], medians["transformers", streams]
        print(f"{streams:>8}{mine:>12,.0f}{peer:>14,.0f}{ratio(streams):>8.2f}")
    together = medians["ours", 16] / medians["ours", 1]
    print(f"16 streams together make {together:.1f} times the tokens of one alone")
    if args.json:
        numbers: dict[str, Any] = {
            f"{name}_{streams}": round(speed, 1) for (name, streams), speed in medians.items()
        }
        numbers |= {
            "ratio_1": round(ratio(1), 3),
            "ratio_16": round(ratio(16), 3),
            "batching": round(together, 3),
        }
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        print(json.dumps(settings | numbers))


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Generate, Generate]:
    """One random model twice: in our engine, and through our export in transformers."""
    from safetensors.torch import save_file

    tokenizer = Tokenizer(merges_for(args.vocab_size))
    config = GPTConfig.of_depth(args.depth, tokenizer.vocab_size, arch="seed", sequence_len=1024)
    model = GPT(config).init_weights(1).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():  # as at the start of training, but no layer is idle
        if not weight.any():
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.size(1) ** 0.5)
    model.lm_head.weight[list(tokenizer.specials.values())] = 0  # so that no answer ends early
    save_file(model.state_dict(), folder / "model.safetensors")
    write_config(folder, config, tokenizer.fingerprint)
    tokenizer.save(folder)
    dtype: torch.dtype = getattr(torch, args.dtype)
    export(folder, folder, folder / "export", dtype=dtype, results={}, name="benchmark")

    own = load_model(folder, dtype=dtype).to(dtype)
    engine = Engine(own, tokenizer, max_rows=16)

    def ours(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        return [answer.ids for answer in engine.complete(prompts, Sampling(max_tokens=tokens))]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=dtype).eval()

    @torch.inference_mode()
    def theirs(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        idx = torch.tensor(prompts)
        made = peer.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            do_sample=False,
            temperature=None,
            top_k=None,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        answers: list[list[int]] = made[:, idx.size(1) :].tolist()
        return answers

    return ours, theirs


def merges_for(vocab_size: int) -> list[tuple[int, int]]:
    """Merges that give a tokenizer of this size; nothing here is ever encoded."""
    return [(i // 256, i % 256) for i in range(vocab_size - 256 - 9)]


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    pairs = [x == y for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return sum(pairs) / len(pairs)


if __name__ == "__main__":
    main()
