"""A pass of the decoder gives the logits of the full forward, whatever it reads together."""

import pytest
import torch

from nanochat_core.infer.decoder import Decoder, Product, PromptChunk, _has_onednn
from nanochat_core.infer.engine import Engine
from nanochat_core.infer.sampling import Sampling
from nanochat_core.model.forward import softcap
from nanochat_core.model.gpt import GPT


def texts(vocab: int, *lengths: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (n,), generator=rng).tolist() for n in lengths]


@torch.no_grad()
def full(model: GPT, text: list[int]) -> torch.Tensor:
    return model(torch.tensor([text]))[0]


@torch.inference_mode()
def one_pass(
    decoder: Decoder, running: list[list[int]], pieces: list[tuple[list[int], PromptChunk]]
) -> torch.Tensor:
    """The last token of each running text, and pieces of others; capped logits after every token."""
    tokens = [text[-1] for text in running]
    before = [text[-2] for text in running]
    positions = [len(text) - 1 for text in running]
    for text, (_, start, size) in pieces:
        tokens += text[start : start + size]
        before += [-1, *text][start : start + size]
        positions += range(start, start + size)
    logits = decoder.read(tokens, before, positions, [piece for _, piece in pieces], None)
    return softcap(logits)


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_pieces_and_running_rows_of_any_length_see_what_a_full_forward_sees(arch: str, build) -> None:
    """With windows: modern's short layers look 128 tokens back, the texts are longer."""
    model = build(arch, sequence_len=512)
    a, b, c = texts(model.config.vocab_size, 300, 150, 290)
    decoder = Decoder(model, 3)
    decoder.reserve(320)
    close = {"atol": 1e-4, "rtol": 1e-4}
    got = one_pass(
        decoder, [], [(a, PromptChunk(0, 0, 299)), (b, PromptChunk(1, 0, 149)), (c, PromptChunk(2, 0, 40))]
    )
    expected = torch.cat((full(model, a)[:299], full(model, b)[:149], full(model, c)[:40]))
    torch.testing.assert_close(got, expected, **close)
    got = one_pass(decoder, [a, b], [(c, PromptChunk(2, 40, 200))])  # ragged rows, and a prompt that goes on
    expected = torch.cat((full(model, a)[-1:], full(model, b)[-1:], full(model, c)[40:240]))
    torch.testing.assert_close(got, expected, **close)
    decoder.copy(2, 0, 240)
    decoder.reserve(384)  # what was read stays
    got = one_pass(decoder, [], [(c, PromptChunk(0, 240, 50))])
    torch.testing.assert_close(got, full(model, c)[240:], **close)


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_beyond_the_trained_length_a_row_sees_what_a_full_forward_sees(arch: str, build) -> None:
    model = build(arch, sequence_len=16)
    (text,) = texts(model.config.vocab_size, 60)
    decoder = Decoder(model, 1)
    decoder.reserve(64)
    got = [one_pass(decoder, [], [(text, PromptChunk(0, 0, 58))])[-1:]]
    got += [one_pass(decoder, [text[:n]], []) for n in (59, 60)]
    torch.testing.assert_close(torch.cat(got), full(model, text)[57:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_is_the_plain_one_and_ignores_the_other_rows(dtype: torch.dtype) -> None:
    if not _has_onednn(dtype):
        pytest.skip("this CPU or build has no oneDNN for the type")
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(96, 64, generator=rng), torch.randn(33, 64, generator=rng).to(dtype)
    product = Product(weight, dtype)
    plain = torch.nn.functional.linear(x, weight.to(dtype))
    torch.testing.assert_close(product(x), plain)
    for n in (1, 2, 7, 16):
        assert torch.equal(product(x[:n]), product(x)[:n])


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_bf16_weights_stay_close_to_fp32_and_answers_do_not_depend_on_company(
    arch: str, build, tokenizer
) -> None:
    if not _has_onednn(torch.bfloat16):
        pytest.skip("this CPU or build has no oneDNN for bf16")
    model = build(arch, n_embd=64)
    (text,) = texts(model.config.vocab_size, 60)
    exact = full(model, text)
    model.compute_dtype = torch.bfloat16
    decoder = Decoder(model, 1)
    decoder.reserve(64)
    off = (one_pass(decoder, [], [(text, PromptChunk(0, 0, 60))]) - exact).abs()
    assert 0 < off.mean() < 0.02 * exact.std()
    prompts = texts(model.config.vocab_size, 5, 20, 9, 33, 14)
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=12)
    together = Engine(model, tokenizer, max_rows=5).complete(prompts, sampling)
    alone = [Engine(model, tokenizer, max_rows=1).complete([prompt], sampling)[0] for prompt in prompts]
    assert together == alone
