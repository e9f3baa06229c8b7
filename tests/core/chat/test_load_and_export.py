"""Models that leave their stage: loaded for a chat, exported, and read by transformers, same logits."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from nanochat_core.artifacts.stage import Job, Runtime
from nanochat_core.infer.load import load_chat
from nanochat_core.stages import export
from nanochat_core.tokenizer.bpe import Tokenizer, train
from nanochat_core.tokenizer.render import render_for_completion

IDX = torch.tensor([[1, 2, 3, 250, 7, 9, 100]])
CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is 12*3?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "12*3"},
                {"type": "python_output", "text": "36"},
                {"type": "text", "text": "36"},
            ],
        },
        {"role": "user", "content": "  the dog  "},
        {"role": "assistant", "content": "mind"},
        {"role": "user", "content": "and?"},
    ]
}


def run_export(directory: Path, target: Path, **config: str) -> None:
    target.mkdir()
    evaluation = target.parent / "sft_eval" / "e0"
    evaluation.mkdir(parents=True, exist_ok=True)
    result = {
        "format": 1,
        "metrics": {"sft/chatcore": 0.3125, "rows": 7, "none": None},
        "files": {},
        "inputs": {},
    }
    (evaluation / "result.json").write_text(json.dumps(result))
    inputs = {
        "model": directory,
        "tokenizer": directory.parents[1] / "tokenizer" / "t0",
        "sft_eval": evaluation,
    }
    job = Job("export", export.Config(**config), inputs, target, Runtime(), "x0")
    metrics = export.run(job.config, job)
    assert metrics["bytes"] == (target / "model.safetensors").stat().st_size


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_a_trained_and_its_exported_model_give_the_same_logits(arch, trained, random_model, tmp_path) -> None:
    model = random_model(arch)
    directory = trained(model)
    run_export(directory, tmp_path / "out")
    expected = model(IDX)
    for place in (directory, tmp_path / "out"):
        loaded, tokenizer = load_chat(place)
        assert torch.equal(loaded(IDX), expected)
        assert tokenizer.decode(tokenizer.encode("the dog")) == "the dog"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| sft_eval | sft/chatcore | 0.3125 |" in card and "None" not in card
    assert not list((tmp_path / "out").glob("*.part"))


def test_transformers_reads_the_export_of_seed(
    trained, random_model, tmp_path, tokenizer, monkeypatch
) -> None:
    model = random_model("seed")
    run_export(trained(model), tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        from transformers import AutoModelForCausalLM, AutoTokenizer

        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert type(theirs).__name__ == "NanoChatForCausalLM"
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDX).logits, model(IDX), atol=2e-5, rtol=1e-4)
        messages = CONVERSATION["messages"]
        ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == render_for_completion(tokenizer, CONVERSATION)
        assert theirs.generation_config.eos_token_id == [
            tokenizer.special("<|assistant_end|>"),
            tokenizer.bos,
        ]
        text = "The quick brown fox's 1234 dogs\n\n  don't mind — 日本 🙂"
        assert their_tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert their_tokenizer.decode(tokenizer.encode(text)) == text


def test_half_precision_exports_and_loads_as_such(trained, random_model, tmp_path) -> None:
    model = random_model("seed")
    run_export(trained(model), tmp_path / "out", dtype="bfloat16")
    loaded, _ = load_chat(tmp_path / "out", dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(loaded(IDX), model(IDX), atol=0.5, rtol=0.1)
    half = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert half < 0.6 * 4 * model.num_params()


def test_another_tokenizer_is_refused(trained, random_model, tmp_path) -> None:
    directory = trained(random_model("modern"))
    run_export(directory, tmp_path / "out")
    other: Tokenizer = train(["something else entirely, something else again"], 280)
    for place in (directory, tmp_path / "out"):
        other.save(tmp_path / "tokenizer" / "t0")
        other.save(tmp_path / "out")
        with pytest.raises(ValueError, match="was trained with tokenizer"):
            load_chat(place)
    with pytest.raises(ValueError, match="was trained with tokenizer"):
        run_export(directory, tmp_path / "again")


def test_a_directory_without_a_model_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        load_chat(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds neither an exported model nor"):
        load_chat(tmp_path)
