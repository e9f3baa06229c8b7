"""Train the same model with three optimizers: nanochat's, AdamW for all weights, and Lion written here.

An optimizer is a list of groups: which parameters, which update rule, which learning rate. A rule is a
function that updates a flat stretch of a parameter in place. Sharding and checkpoints come with it.
"""

from typing import Any

from torch import Tensor

from nanochat_core import GPT, GPTConfig, Group, fit, parameter_groups, text_batches, train_tokenizer

TEXT = [f"{a} times {b} is {a * b}." for a in range(20) for b in range(20)]
STEPS = 40


def lion(p: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *, lr: float, **rest: Any) -> None:
    """One step of Lion, https://arxiv.org/abs/2302.06675. Uses one of the two state tensors, `mean`."""
    beta1, beta2 = rest["betas"]
    update = mean.lerp(grad, 1 - beta1).sign_()
    p.mul_(1 - lr * rest["weight_decay"]).add_(update, alpha=-lr)
    mean.lerp_(grad, 1 - beta2)


def nanochat(model: GPT) -> list[Group]:
    """Muon for the matrices of the blocks, AdamW for the rest, each at its own rate."""
    return parameter_groups(model)


def adamw(model: GPT) -> list[Group]:
    names, params = zip(*model.named_parameters(), strict=True)
    return [Group("elementwise", names, params, lr=0.01, betas=(0.9, 0.95))]


def lion_for_all(model: GPT) -> list[Group]:
    names, params = zip(*model.named_parameters(), strict=True)
    return [Group("elementwise", names, params, lr=0.003, betas=(0.9, 0.99), rule=lion)]


def main() -> None:
    tokenizer = train_tokenizer(TEXT, vocab_size=300)
    shape = GPTConfig.of_depth(2, tokenizer.vocab_size, sequence_len=64, aspect=32, head_dim=32)
    batches = text_batches(TEXT, tokenizer, rows=4, T=64)
    for optimizer in (nanochat, adamw, lion_for_all):
        model = GPT(shape).init_weights(seed=1)
        history = fit(model, batches, steps=STEPS, groups=optimizer(model))
        curve = [row["loss"] for row in history][:: STEPS // 4]
        print(f"{optimizer.__name__:<13}", *(f"{loss:.2f}" for loss in curve), f"{history[-1]['loss']:.2f}")


if __name__ == "__main__":
    main()
