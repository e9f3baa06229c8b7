"""A one-line change of the model: training, evaluation and decoding follow together, or decoding refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CORE = Path(__file__).parents[3] / "nanochat_core"

# file of nanochat_core/model, what stands there, what takes its place
CHANGES = {
    "activation": ("forward", "F.relu(x).square()", "F.gelu(x)"),
    "softcap": ("forward", "SOFTCAP = 15.0", "SOFTCAP = 4.0"),
    "attention scale": ("shape", '1.0 if self.arch == "seed" else 1.2', "2.0"),
    "norm epsilon": ("forward", "NORM_EPS = 1e-6", "NORM_EPS = 1e-2"),
    "backout layer": ("shape", "return self.n_layer // 2", "return 1"),
    "smear gate": ("forward", "scalars.smear * torch.sigmoid(", "scalars.smear * torch.tanh("),
    "value gate factor": ("forward", "VALUE_GATE = 3.0", "VALUE_GATE = 2.0"),
    "rotary base": ("shape", "else 100_000.0", "else 50.0"),
}
# What the decoder computes by forms of its own. It follows no change of these, and says so.
REFUSED = {
    "layer 0: the residual stream": (
        "forward",
        "F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)",
        "F.normalize(x, dim=-1)",
    ),
    "layer 0: attention": ("forward", "x1, x2 = x.chunk(2, dim=-1)", "x1, x2 = x[..., ::2], x[..., 1::2]"),
    "in softcap": ("forward", "logits.div_(SOFTCAP).tanh_()", "logits.div_(SOFTCAP).atan_()"),
}
RUN = """
import json, shutil, sys
from pathlib import Path

import torch

core, folder = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)


def measured():
    from nanochat_core.eval.spans import Candidate, score
    from nanochat_core.infer.decoder import Decoder, PromptChunk
    from nanochat_core.infer.sampling import shifted_softcap
    from nanochat_core.model.forward import SOFTCAP
    from nanochat_core.model.gpt import GPT
    from nanochat_core.model.shape import GPTConfig

    config = GPTConfig(sequence_len=32, vocab_size=64, n_layer=5, n_head=4, n_kv_head=2, n_embd=32)
    model, rng = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng) / weight.size(-1) ** 0.5)
        model.lm_head.weight.mul_(5)
    ids = torch.randint(64, (25,), generator=rng).tolist()
    loss, nll = model.loss(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), torch.ones(1, 24) / 24)
    other = [*ids[:-1], (ids[-1] + 1) % 64]
    ((span, _),) = score(model, [[Candidate(ids, 24, 25), Candidate(other, 24, 25)]], device="cpu")
    try:
        decoder = Decoder(model, 1)
    except ValueError as problem:
        return {"refused": str(problem)}
    decoder.reserve(32)
    logits = [decoder.read(ids[:20], [-1, *ids[:19]], range(20), [PromptChunk(0, 0, 20)], None)]
    logits += [decoder.read([ids[i]], [ids[i - 1]], [i], [], None) for i in range(20, 24)]
    decoded = shifted_softcap(torch.cat(logits)) - SOFTCAP  # what is sampled from
    forward = model(torch.tensor([ids[:-1]]))[0]
    nlls = [nll[0, -1].item(), span.loss]
    return {"loss": loss.item(), "nlls": nlls, "forward": forward.tolist(), "decoded": decoded.tolist()}


found = {}
for name, change in json.loads(sys.argv[3]).items():
    here = folder / str(len(found))
    for package in ("", "model", "infer", "eval"):
        shutil.copytree(core / package, here / "nanochat_core" / package, dirs_exist_ok=True,
                        ignore=lambda at, names: [n for n in names if not n.endswith(".py")])
    if change is not None:
        file, old, new = change
        path = here / "nanochat_core" / "model" / f"{file}.py"
        text = path.read_text()
        assert text.count(old) == 1, (name, text.count(old))
        path.write_text(text.replace(old, new))
    for module in [name for name in sys.modules if name.partition(".")[0] == "nanochat_core"]:
        del sys.modules[module]
    sys.path.insert(0, str(here))
    found[name] = measured()
    assert sys.modules["nanochat_core.model.forward"].__file__.startswith(str(here))
    del sys.path[0]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a model of random weights computes as it is, and after each change of its source."""
    changes = json.dumps({"none": None} | CHANGES | REFUSED)
    folder = tmp_path_factory.mktemp("changed")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(CORE), str(folder), changes], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["none", *CHANGES])
def test_training_evaluation_and_decoding_move_together(name: str, found: dict[str, Any]) -> None:
    plain, changed = found["none"], found[name]
    forward, decoded = (torch.tensor(changed[key]) for key in ("forward", "decoded"))
    torch.testing.assert_close(decoded, forward, atol=2e-4, rtol=2e-4)
    trained, evaluated = changed["nlls"]
    assert evaluated == pytest.approx(trained, abs=2e-4)
    if name != "none":

        def moved(logits: Tensor, key: str) -> float:
            return float((logits - torch.tensor(plain[key])).abs().max())

        assert abs(changed["loss"] - plain["loss"]) > 1e-3
        assert moved(forward, "forward") > 0.05 and moved(decoded, "decoded") > 0.05


@pytest.mark.parametrize("where", REFUSED)
def test_a_change_that_the_decoders_own_forms_do_not_follow_is_refused(
    where: str, found: dict[str, Any]
) -> None:
    assert where in found[where]["refused"]
