"""CORE for models of transformers and for ours, by name and by the command: random ones, made here."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nanochat_core.cli.main import app
from nanochat_core.eval import bench, core
from nanochat_core.eval.subject import TransformersTokens, load_subject
from nanochat_core.infer.exported import export
from nanochat_core.model.gpt import GPT, write_config
from nanochat_core.model.shape import GPTConfig
from nanochat_core.sources import bundle
from nanochat_core.tokenizer.bpe import Tokenizer, train
from nanochat_core.train.checkpoint import save_model

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def weights(model: torch.nn.Module) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=rng) / weight.size(-1) ** 0.5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["the capital of this country is a city and its coast is 12 km long"], 300)


@pytest.fixture(scope="module")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama and a GPT-2 as transformers saves them, and a `seed` of ours as we export it."""
    found = {}
    size = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.bos}
    llama = transformers.LlamaConfig(
        **size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
    )
    gpt2 = transformers.GPT2Config(**size, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    for name, config in (("llama", llama), ("gpt2", gpt2)):
        found[name] = tmp_path_factory.mktemp(name)
        model = transformers.AutoModelForCausalLM.from_config(config)
        weights(model)
        model.save_pretrained(found[name])
        tokenizer.to_huggingface(found[name])
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>"}
        (found[name] / "tokenizer_config.json").write_text(json.dumps(described))
    shape = GPTConfig("seed", 96, tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    ours = GPT(shape).init_weights(0)
    weights(ours)
    at, found["ours"] = tmp_path_factory.mktemp("stage"), tmp_path_factory.mktemp("exported")
    tokenizer.save(at)
    write_config(at, shape, tokenizer.fingerprint)
    save_model(at, ours)
    export(at, at, found["ours"], results={}, name="ours")
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the demo."""
    at = tmp_path_factory.mktemp("bundle")
    for name, text in bundle.files().items():
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).write_text(text)
    return at


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_foreign_model_answers_alike_in_batches_and_alone(
    name: str, saved: dict[str, Path], files: Path
) -> None:
    subject = load_subject(str(saved[name]), CPU)
    assert subject.context == {"llama": 96, "gpt2": 64}[name]  # long examples lose their beginning
    for task in core.read_bundle(files):
        examples = core.read_examples(task, 12)
        together, alone = (
            core.evaluate(
                subject.model, subject.tokenizer, task, examples, context=subject.context, batch_tokens=most
            )
            for most in (4096, 1)
        )
        assert [(o.correct, o.chosen) for o in together] == [(o.correct, o.chosen) for o in alone]
        assert [o.losses for o in together] == [pytest.approx(o.losses, abs=1e-4) for o in alone]


def test_losses_are_what_transformers_itself_computes(saved: dict[str, Path]) -> None:
    subject = load_subject(str(saved["llama"]), CPU)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved["llama"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved["llama"])
    task = core.IclTask("made", "multiple_choice", Path(), 0, " ", 0.5)
    example = {"query": "the capital of this", "choices": ["city", "is long"], "gold": 0}
    (outcome,) = core.evaluate(subject.model, subject.tokenizer, task, [example], context=96)
    ids = [
        [tokenizer.bos_token_id, *tokenizer.encode(f"the capital of this {choice}")]
        for choice in ("city", "is long")
    ]
    start = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    for row, loss in zip(ids, outcome.losses, strict=True):
        labels = torch.tensor([[-100] * start + row[start:]])
        with torch.no_grad():
            assert loss == pytest.approx(float(model(torch.tensor([row]), labels=labels).loss), abs=1e-4)


def test_an_exported_model_scores_the_same_read_by_us_and_by_transformers(
    saved: dict[str, Path], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanochat_core.eval import subject

    ours = load_subject(str(saved["ours"]), CPU)
    assert isinstance(ours.model, GPT)
    monkeypatch.setattr(subject, "is_exported", lambda directory: False)
    theirs = load_subject(str(saved["ours"]), CPU)
    assert not isinstance(theirs.model, GPT)
    for task in core.read_bundle(files):
        examples = core.read_examples(task, 6)
        a, b = (core.evaluate(one.model, one.tokenizer, task, examples, context=96) for one in (ours, theirs))
        assert [o.losses for o in a] == [pytest.approx(o.losses, abs=1e-3) for o in b]


def test_the_command_gives_the_table_and_does_nothing_twice(
    saved: dict[str, Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["core", str(saved["llama"]), "--bundle", str(files), "--max-per-task", "5", "--device", "cpu"]
    command += ["--base-dir", str(tmp_path)]
    first = CliRunner().invoke(app, command, catch_exceptions=False)
    assert first.exit_code == 0 and "CORE" in first.stdout and "factbook_recall" in first.stdout
    monkeypatch.setattr(core, "evaluate", None)  # nothing is answered again
    again = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    found = json.loads(again.stdout)
    assert len(found["tasks"]) == 7
    assert found["core"] == pytest.approx(sum(task["centered"] for task in found["tasks"].values()) / 7)
    directory = Path(found["directory"])
    assert directory.parent == tmp_path / "core"
    assert len((directory / "factbook_recall.jsonl").read_text().splitlines()) == 5
    assert (directory / "core.csv").read_text().splitlines()[-1].startswith("CORE")


def test_answers_of_another_evaluation_are_never_taken_for_this_ones(
    saved: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    def run(limit: int) -> Any:
        return bench.core_of(
            str(saved["gpt2"]), files, tmp_path / "out", "cpu", limit, lambda text: None, False
        )

    assert run(2).scores[0].examples == 2
    with pytest.raises(ValueError, match="has the answers of another model, bundle or number of examples"):
        run(3)


def test_what_cannot_be_loaded_is_said_in_a_sentence(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")  # nothing is asked of the hub
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no causal language model that can be loaded"):
        load_subject(str(tmp_path / "empty"), CPU)
    with pytest.raises(
        ValueError, match=r"pretrian is no .* give a stage of the latest run, a directory, or"
    ):
        CliRunner().invoke(app, ["core", "pretrian", "--bundle", str(files)], catch_exceptions=False)

    class Nameless:
        bos_token_id = eos_token_id = None

    with pytest.raises(ValueError, match="the tokenizer of x has no token that begins or ends a document"):
        TransformersTokens(Nameless(), "x")
    with pytest.raises(ValueError, match=r"no files of CORE in .*--bundle DIR, or try: nanochat stage"):
        CliRunner().invoke(app, ["core", "--base-dir", str(tmp_path)], catch_exceptions=False)


def test_texts_become_tokens_without_any_specials(saved: dict[str, Path], tokenizer: Tokenizer) -> None:
    subject = load_subject(str(saved["llama"]), CPU)
    rng = random.Random(0)
    texts = ["".join(rng.choices("the capital of 12 km", k=20)) for _ in range(5)]
    assert subject.tokenizer.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert subject.tokenizer.bos == tokenizer.bos
    assert subject.tokenizer.encode_batch([]) == []
