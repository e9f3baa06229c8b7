"""Gradients that come out the same each time on CUDA, where the usual kernels add in whatever order they
finish.

On a CPU nothing is to be done. On a GPU this is what torch offers for it, and unproven here: there was none.
"""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def repeatable(device: torch.device, wanted: bool, compiled: bool) -> Iterator[None]:
    """Around a forward and backward pass: kernels without atomics, and an error where there is none.

    A warning instead of the error would not do: attention's backward pass then keeps its atomics. What has no
    backward pass, evaluation and sampling, is left as it is.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    # cuBLAS reads it at its first product, and refuses to be repeatable without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Filling fresh memory with NaN would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if compiled:
        import torch._inductor.config as inductor

        inductor.deterministic = True  # no choice between kernels by how fast they were today
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise ValueError(
            f"{str(error).splitlines()[0]} Set runtime.deterministic=false to train without: a resumed run "
            "then differs from one that never stopped"
        ) from None
    finally:
        torch.use_deterministic_algorithms(False)
