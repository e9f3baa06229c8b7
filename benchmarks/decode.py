"""Decoding speed of our engine beside transformers' NanoChat `generate`: same weights, prompts and tokens.

    uv run python benchmarks/decode.py [--depth 4] [--threads 2] [--json]

Both have a KV cache and decode greedily, one stream and 16, with weights in fp32 and in bf16. All take turns,
and a ratio is the median over the rounds, so that what else the machine does falls on all alike. The model is
of the `seed` preset, with random weights (speed does not depend on what it has learned), and reaches
transformers through our export. The fp32 tokens of both are compared before anything is measured.

`ratio_1` and `ratio_16` are ours as it comes (the precision that the chat picks on this machine) to
transformers as it comes (that of the export, fp32); `_best` is against the faster of transformers' two
precisions; `_float32` and `_bfloat16` are equal precision on both sides.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat_core.infer.engine import Engine
from nanochat_core.infer.exported import export
from nanochat_core.infer.load import load_chat
from nanochat_core.infer.sampling import Sampling
from nanochat_core.model.gpt import GPT, load_model, write_config
from nanochat_core.model.shape import GPTConfig
from nanochat_core.tokenizer.bpe import Tokenizer

Generate = Callable[[list[list[int]], int], list[list[int]]]
DTYPES = ("float32", "bfloat16")
STREAMS = (1, 16)


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
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def run(args: argparse.Namespace, folder: Path) -> None:
    """All contenders in turn at both widths, the table, and the line of JSON."""
    chosen, contenders = prepare(args, folder)
    generator = torch.Generator().manual_seed(1)
    shape = (16, args.prompt)
    prompts: list[list[int]] = torch.randint(0, args.vocab_size - 9, shape, generator=generator).tolist()
    speeds: dict[tuple[str, str, int], list[float]] = {}
    for streams in STREAMS:
        some = prompts[:streams]
        first = {key: generate(some, 16) for key, generate in contenders.items()}
        agree = agreement(first["ours", "float32"], first["transformers", "float32"])
        if agree < 1:
            raise SystemExit(f"the tokens differ: {agree:.0%} agree; a speed would mean nothing")
        for _ in range(args.rounds):
            for (name, dtype), generate in contenders.items():
                start = time.perf_counter()
                answers = generate(some, args.tokens)
                seconds = time.perf_counter() - start
                assert all(len(answer) == args.tokens for answer in answers)
                speeds.setdefault((name, dtype, streams), []).append(streams * args.tokens / seconds)

    def ratio(streams: int, ours: str, theirs: str) -> float:
        pairs = zip(speeds["ours", ours, streams], speeds["transformers", theirs, streams], strict=True)
        return statistics.median(mine / peer for mine, peer in pairs)

    print(f"d{args.depth}, vocabulary {args.vocab_size:,}, {args.threads} threads,", end=" ")
    print(f"{args.prompt} tokens read and {args.tokens} made per stream; tokens/s")
    print(f"{'streams':>8}{'weights':>10}{'ours':>10}{'transformers':>14}{'ratio':>8}")
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    ratios: dict[str, float] = {}
    for streams in STREAMS:
        for dtype in DTYPES:
            ratios[f"ratio_{streams}_{dtype}"] = ratio(streams, dtype, dtype)
            mine, peer = medians["ours", dtype, streams], medians["transformers", dtype, streams]
            shown = f"{mine:>10,.0f}{peer:>14,.0f}{ratios[f'ratio_{streams}_{dtype}']:>8.2f}"
            print(f"{streams:>8}{dtype:>10}{shown}")
    for streams in STREAMS:
        ratios[f"ratio_{streams}_best"] = min(ratio(streams, chosen, dtype) for dtype in DTYPES)
        ratios[f"ratio_{streams}"] = ratio(streams, chosen, "float32")
        print(
            f"{streams} at once, ours as it comes ({chosen}): {ratios[f'ratio_{streams}']:.2f} times "
            f"transformers as it comes, {ratios[f'ratio_{streams}_best']:.2f} times its best"
        )
    together = medians["ours", chosen, 16] / medians["ours", chosen, 1]
    print(f"16 streams together make {together:.1f} times the tokens of one alone")
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        numbers = {"_".join(map(str, key)): round(speed, 1) for key, speed in medians.items()}
        last = {"batching": together} | dict(sorted(ratios.items(), reverse=True))
        print(json.dumps(settings | {"ours": chosen} | numbers | {k: round(v, 3) for k, v in last.items()}))


def prepare(args: argparse.Namespace, folder: Path) -> tuple[str, dict[tuple[str, str], Generate]]:
    """One random model, in our engine and through our export in transformers, in both precisions; and the
    precision that our chat would choose for it here."""
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
    export(folder, folder, folder / "export", results={}, name="benchmark")
    contenders: dict[tuple[str, str], Generate] = {}
    for dtype in DTYPES:
        contenders["ours", dtype] = our_engine(folder, tokenizer, getattr(torch, dtype))
        contenders["transformers", dtype] = their_generate(folder / "export", getattr(torch, dtype))
    chosen, _ = load_chat(folder / "export")
    return str(chosen.compute_dtype).removeprefix("torch."), contenders


def our_engine(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype) -> Generate:
    engine = Engine(load_model(folder, dtype=dtype).to(dtype), tokenizer, max_rows=16)
    engine.reserve(1024)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        engine.forget()  # every round reads its prompts, as transformers does
        return [answer.ids for answer in engine.complete(prompts, Sampling(max_tokens=tokens))]

    return generate


def their_generate(folder: Path, dtype: torch.dtype) -> Generate:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
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

    return generate


def merges_for(vocab_size: int) -> list[tuple[int, int]]:
    """Merges that give a tokenizer of this size; nothing here is ever encoded."""
    return [(i // 256, i % 256) for i in range(vocab_size - 256 - 9)]


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    pairs = [x == y for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return sum(pairs) / len(pairs)


if __name__ == "__main__":
    main()
