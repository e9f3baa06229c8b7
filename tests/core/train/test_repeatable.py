"""What is asked of torch on CUDA, looked at without one: the switches, and what a refusal says."""

import os
from collections.abc import Iterator

import pytest
import torch

from nanochat_core.train.repeatable import repeatable

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]
    assert not torch.are_deterministic_algorithms_enabled()


def test_on_cuda_torch_is_asked_for_an_order_during_a_pass_only() -> None:
    with repeatable(CUDA, True, False):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention would keep its atomics
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("device", "wanted"), [(CPU, True), (CUDA, False)])
def test_elsewhere_and_where_it_is_switched_off_nothing_is_asked(device: torch.device, wanted: bool) -> None:
    with repeatable(device, wanted, True):
        assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_an_operation_that_knows_no_order_is_told_with_the_switch() -> None:
    with (
        pytest.raises(ValueError, match=r"put_ does not have .* Set runtime\.deterministic=false"),
        repeatable(CUDA, True, False),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_running_out_of_memory_stays_what_it_is() -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError), repeatable(CUDA, True, False):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
