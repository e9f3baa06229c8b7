"""What a model costs: parameters by kind and floating-point operations per token, by arithmetic alone.

Training FLOPs follow nanochat's estimate: six per matrix weight, and twelve per head channel and position
looked at, the causal half not discounted. Gates and scalars of `modern` count as the matrices they are;
embeddings are looked up and cost nothing.
"""

from nanochat_core.model.shape import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig


def num_params(c: GPTConfig) -> dict[str, int]:
    """Parameters by kind; their sum is the model's size."""
    kv = c.n_kv_head * c.head_dim
    with_ve = sum(c.has_value_embedding(i) for i in range(c.n_layer))
    matrices = c.n_layer * (2 * c.n_embd * c.n_embd + 2 * c.n_embd * kv + 8 * c.n_embd * c.n_embd)
    counts = {"wte": c.padded_vocab * c.n_embd, "lm_head": c.padded_vocab * c.n_embd}
    if c.arch == "modern":
        matrices += with_ve * VALUE_GATE_CHANNELS * c.n_kv_head
        counts["value_embeds"] = with_ve * c.padded_vocab * kv
        counts["scalars"] = 2 * c.n_layer + 2 + SMEAR_CHANNELS
    return counts | {"matrices": matrices}


def scaling_params(c: GPTConfig) -> int:
    """What the token horizon is measured against: all of `seed`'s parameters; `modern`'s matrices and
    head."""
    counts = num_params(c)
    return sum(counts.values()) if c.arch == "seed" else counts["matrices"] + counts["lm_head"]


def flops_per_token(c: GPTConfig) -> int:
    """Training FLOPs, forward and backward, of one token."""
    counts = num_params(c)
    dense = counts["matrices"] + counts["lm_head"]
    looked_at = sum(min(w, c.sequence_len) for w in c.windows())
    return 6 * dense + 12 * c.n_head * c.head_dim * looked_at
