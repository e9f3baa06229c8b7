"""The model against published sizes, against transformers, and against plain implementations of its clever
parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.model import attention
from nanochat_core.model.cross_entropy import SLICE_ELEMENTS
from nanochat_core.model.flops import flops_per_token, num_params, scaling_params
from nanochat_core.model.gpt import GPT, GPTConfig

ARCHS = ("seed", "modern")


def small(arch: str, depth: int = 3, T: int = 300, aspect: int = 16) -> GPT:
    """Random everywhere: at their initial values many parts of the model do nothing."""
    config = GPTConfig.of_depth(depth, 301, arch=arch, sequence_len=T, aspect=aspect, head_dim=16)  # type: ignore[arg-type]
    model = GPT(config).init_weights(1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)
    return model


def tokens(rows: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 301, (rows, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("arch", "depth", "vocab", "params"),
    [
        ("seed", 20, 65_536, 560_988_160),
        ("seed", 4, 65_536, 36_700_160),
        ("seed", 32, 65_536, 1_879_048_192),
        ("modern", 12, 32_768, 286_261_730),
        ("modern", 20, 32_768, 896_533_746),
        ("modern", 24, 32_768, 1_384_122_122),
    ],
)
def test_sizes_are_the_published_ones(arch: str, depth: int, vocab: int, params: int) -> None:
    config = GPTConfig.of_depth(depth, vocab, arch=arch)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == sum(num_params(config).values()) == params


def test_cost_of_a_token_is_the_published_one() -> None:
    seed = GPTConfig.of_depth(20, 65_536, arch="seed")
    assert flops_per_token(seed) == 3_491_758_080
    assert flops_per_token(GPTConfig.of_depth(24, 32_768)) == pytest.approx(4.78e9, rel=2e-3)
    assert scaling_params(GPTConfig.of_depth(12, 32_768)) == pytest.approx(110.1e6, rel=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_any_depth_works(arch: str, depth: int) -> None:
    model = small(arch, depth, T=32, aspect=24)
    assert model(tokens(2, 32)).shape == (2, 32, 301)


def test_a_shape_that_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide a width of 128"):
        GPTConfig(n_embd=128, n_head=3, n_kv_head=3)
    with pytest.raises(ValueError, match="at least 24 wide, not 16"):
        GPTConfig(n_embd=16, n_head=1, n_kv_head=1)


def test_seed_gives_the_logits_of_transformers() -> None:
    from transformers import NanoChatConfig, NanoChatForCausalLM

    model = small("seed", 3, T=64)
    c = model.config
    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=4 * c.n_embd,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            max_position_embeddings=c.sequence_len,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        )
    ).eval()
    names = {
        "wte.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "attn.c_q": "self_attn.q_proj",
        "attn.c_k": "self_attn.k_proj",
        "attn.c_v": "self_attn.v_proj",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "blocks.": "model.layers.",
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, other in names.items():
            name = name.replace(ours, other) if ours != "wte.weight" or name == ours else name
        weights[name] = tensor
    theirs.load_state_dict(weights)
    idx = tokens(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_loss_in_slices_equals_the_loss_of_full_logits(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SLICE_ELEMENTS, "cpu", 7 * 301)  # 7 rows a slice
    model, idx = small(arch), tokens(2, 300)
    targets = tokens(2, 300, seed=1)
    targets[0, :9] = -1
    weights = torch.rand(2, 300, generator=torch.Generator().manual_seed(3)) - 0.5
    logits = model(idx)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    (plain * weights.flatten()).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    total, nll = model.loss(idx, targets, weights)
    total.backward()
    torch.testing.assert_close(nll.flatten(), plain.detach(), atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("T", "window"), [(300, 128), (256, 128), (130, 128), (40, 64), (7, 1), (64, 63)])
def test_a_sliding_window_equals_a_dense_mask(T: int, window: int) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 8, generator=rng) for _ in range(3))
    t = torch.arange(T)
    seen = (t[None] <= t[:, None]) & (t[None] >= t[:, None] - window)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(attention.causal(q, k, v, window), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_models_block_masks_equal_the_bands() -> None:
    """The path of CUDA, by the kernel torch makes of it for this CPU, which has no backward pass."""
    config = GPTConfig.of_depth(4, 200, sequence_len=512, aspect=16, head_dim=16)
    assert min(config.windows()) < 511
    model = GPT(config).init_weights(1).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    idx = torch.randint(0, 200, (2, 512), generator=torch.Generator().manual_seed(0))
    banded = model(idx)
    model.use_block_masks(torch.device("cpu"))
    torch.testing.assert_close(torch.compile(model)(idx), banded, atol=2e-3, rtol=1e-3)
    graph = torch._dynamo.explain(model.forward)(idx)  # type: ignore[attr-defined]
    targets = [str(node.target) for part in graph.graphs for node in part.graph.nodes]
    used = [target for target in targets if "flex_attention" in target]
    assert graph.graph_break_count == 0 and len(used) == sum(w < 511 for w in config.windows())


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = GPTConfig.of_depth(2, 64, aspect=16, head_dim=16)
    torch.manual_seed(5)
    a = GPT(config).init_weights(1).state_dict()
    torch.manual_seed(6)
    b = GPT(config).init_weights(1).state_dict()
    c = GPT(config).init_weights(2).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["wte.weight"], c["wte.weight"])


def test_the_first_prediction_is_the_uniform_one() -> None:
    """The head of `seed` starts at zero, so its first loss is the logarithm of the vocabulary."""
    model = GPT(
        GPTConfig.of_depth(2, 301, arch="seed", sequence_len=16, aspect=16, head_dim=16)
    ).init_weights(0)
    _, nll = model.loss(tokens(1, 16), tokens(1, 16, seed=1), torch.ones(1, 16))
    torch.testing.assert_close(nll, torch.full((1, 16), 301.0).log())


@pytest.mark.parametrize(("arch", "far"), [("seed", True), ("modern", False)])
@torch.no_grad()
def test_beyond_the_trained_length_seed_sees_the_beginning_and_modern_a_window(arch: str, far: bool) -> None:
    model = small(arch, depth=1, T=16, aspect=32).eval()
    ids = tokens(1, 60)
    other = ids.clone()
    other[0, 0] += 1
    a, b = (model.hidden(each)[0, -1] for each in (ids, other))
    assert a.equal(b) != far
