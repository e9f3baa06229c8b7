"""Drawing tokens: the right distribution, and a row that does not know its neighbours."""

import pytest
import torch

from nanochat_core.infer.sampling import Sampler, Sampling, _top, best, uniforms

CPU = torch.device("cpu")


def draw(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    n = len(uniform)
    return Sampler([sampling] * n, CPU)(logits.expand(n, -1), uniform)


def frequencies(logits: torch.Tensor, sampling: Sampling, n: int = 20_000) -> torch.Tensor:
    tokens = draw(logits, sampling, uniforms(1, n))
    return torch.bincount(tokens, minlength=len(logits)) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    found = frequencies(logits, Sampling(temperature=temperature))
    torch.testing.assert_close(found, (logits / temperature).softmax(0), atol=0.015, rtol=0)
    assert found[-1] == 0


def test_top_k_keeps_the_k_best_and_their_proportions() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    found = frequencies(logits, Sampling(temperature=1.0, top_k=2))
    expected = (
        torch.tensor([0.0, 3.0, -torch.inf, 2.0]).index_fill(0, torch.tensor([0]), -torch.inf).softmax(0)
    )
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    found = frequencies(logits, Sampling(temperature=1.0, top_p=0.6))
    torch.testing.assert_close(found, torch.tensor([0, 4 / 7, 3 / 7, 0]), atol=0.015, rtol=0)
    assert frequencies(logits, Sampling(temperature=1.0, top_p=1e-9))[1] == 1


def test_a_tiny_temperature_and_a_top_k_of_one_are_greedy() -> None:
    logits = torch.tensor([1.0, 1.001, 0.5])
    for sampling in (Sampling(), Sampling(temperature=1e-12), Sampling(temperature=3.0, top_k=1)):
        assert frequencies(logits, sampling, 100)[1] == 1


def test_the_ends_of_the_unit_interval_give_possible_tokens() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, Sampling(temperature=1.0), edge).tolist() == [1, 2]


def test_a_row_draws_the_same_token_whoever_is_beside_it() -> None:
    kinds = [
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=0.3, top_k=7),
        Sampling(temperature=0.9, top_k=3),
        Sampling(temperature=1.1, top_p=0.7),
        Sampling(temperature=1.1, top_p=0.9, top_k=20),
    ]
    logits = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    rows, uniform = kinds * 10, uniforms(3, 60)
    together = Sampler(rows, CPU)(logits, uniform)
    for i, sampling in enumerate(rows):
        assert together[i] == Sampler([sampling], CPU)(logits[i : i + 1], uniform[i : i + 1])


def test_the_first_random_numbers_do_not_depend_on_how_many_are_drawn() -> None:
    for n in (1, 7, 16, 100):
        assert torch.equal(uniforms(5, n), uniforms(5, 1000)[:n])


@pytest.mark.parametrize("vocab", [5, 128, 300, 1024])
def test_blocks_find_what_the_whole_vocabulary_would(vocab: int) -> None:
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # with ties
    assert torch.equal(best(logits), logits.argmax(1))
    for k in (1, 3, 50):
        values, ids = _top(logits, min(k, vocab))
        assert torch.equal(values, logits.topk(min(k, vocab), dim=1).values)
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("vocab", [300, 1024])
def test_drawing_from_many_blocks_follows_softmax(vocab: int) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)) * 2
    found = frequencies(logits, Sampling(temperature=1.0), 100_000)
    torch.testing.assert_close(found, logits.softmax(0), atol=0.005, rtol=0)
    assert found.shape == (vocab,)


def test_a_softcap_changes_probabilities_as_tanh_does() -> None:
    logits = torch.tensor([30.0, 20.0, 5.0, -40.0])
    uniform = uniforms(1, 20_000)
    sampler = Sampler([Sampling(temperature=1.0)] * len(uniform), CPU, raw=True)
    tokens = sampler(logits.expand(len(uniform), -1), uniform)
    expected = (15 * torch.tanh(logits / 15)).softmax(0)
    torch.testing.assert_close(torch.bincount(tokens, minlength=4) / 20_000, expected, atol=0.015, rtol=0)
