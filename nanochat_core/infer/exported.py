"""A model as one directory that others can read: weights, shape, tokenizer, generation settings, model card.

`seed` has the layout of transformers' NanoChatForCausalLM; `modern`, which it does not know, keeps ours.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_core.artifacts.store import write_json, write_whole
from nanochat_core.infer.model_card import model_card
from nanochat_core.model.forward import HIDDEN_ACT, NORM_EPS, SOFTCAP
from nanochat_core.model.gpt import GPT, load_model, read_config, write_config
from nanochat_core.model.shape import GPTConfig
from nanochat_core.tokenizer.bpe import FILE, Tokenizer, load_tokenizer

OURS = "nanochat"  # the key of config.json under which our own description stands beside transformers' one

# What render_conversation does, in Jinja: a system message goes into the first user turn, calls into markers.
CHAT_TEMPLATE = """\
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- set turns = messages[1:] if system else messages -%}
{{- '<|bos|>' -}}
{%- for message in turns -%}
  {%- if message['role'] == 'user' -%}
    {{- '<|user_start|>' + (system if loop.first else '') + message['content'] + '<|user_end|>' -}}
  {%- elif message['content'] is string -%}
    {{- '<|assistant_start|>' + message['content'] + '<|assistant_end|>' -}}
  {%- else -%}
    {{- '<|assistant_start|>' -}}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'python' -%}
        {{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
      {%- elif part['type'] == 'python_output' -%}
        {{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
      {%- else -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
    {{- '<|assistant_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


def export(
    model_directory: Path,
    tokenizer_directory: Path,
    target: Path,
    *,
    dtype: torch.dtype = torch.float32,
    results: Mapping[str, Mapping[str, Any]],
    name: str,
) -> int:
    """Write the export to `target`; its parameter count. `results`: for the card, metrics by stage.

    What is exported already can be exported again, to have it in another `dtype`.
    """
    if is_exported(model_directory):
        model, tokenizer = load_exported(model_directory)
    else:
        tokenizer = load_tokenizer(tokenizer_directory)
        model = trained_model(model_directory, tokenizer)
    save(model, tokenizer, target, dtype=dtype, results=results, name=name)
    return model.num_params()


def save(
    model: GPT,
    tokenizer: Tokenizer,
    target: Path,
    *,
    dtype: torch.dtype = torch.float32,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    name: str | None = None,
) -> None:
    """Write a model and its tokenizer as a directory that `load` and `nanochat chat` open; transformers opens
    a `seed` model's too. A model that is there already is replaced.

    `dtype` is that of the saved weights. `results` (metrics by stage) and `name` (the directory's) are for
    the model card.
    """
    from safetensors.torch import save as serialized

    config = model.config
    weights = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    target.mkdir(parents=True, exist_ok=True)
    if config.arch == "seed":
        weights = {theirs: weights[ours] for ours, theirs in _names(config)}
        write_json(target / "config.json", _their_config(config, tokenizer, dtype))
    else:
        write_config(target, config, tokenizer.fingerprint)
    write_whole(target / "model.safetensors", serialized(weights, metadata={"format": "pt"}))
    tokenizer.save(target)
    tokenizer.to_huggingface(target)
    write_json(target / "tokenizer_config.json", _tokenizer_config(config, tokenizer))
    write_json(target / "generation_config.json", _generation_config(tokenizer))
    write_whole(
        target / "README.md",
        model_card(config, model.num_params(), results or {}, name or target.resolve().name),
    )


FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    FILE,
)


def push_to_hub(directory: Path, repo: str) -> str:
    """Send an export to a repository of the Hugging Face hub, by its own client; the address.

    The repository is made, and kept private, if there is none. The token is HF_TOKEN or `hf auth login`'s.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.whoami()  # a clear word before a gigabyte is sent
        made = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=directory,
            allow_patterns=list(FILES),
            commit_message="nanochat export",
        )
    except LocalTokenNotFoundError:
        raise ValueError("the hub wants a token: set HF_TOKEN to one that may write") from None
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is not a repository's name on the hub: {error}") from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(f"the hub refuses: HF_TOKEN may not write to {repo}") from None
        raise ValueError(f"{directory} is complete, but the hub did not take it: {error}") from None
    return str(made)


def load_exported(directory: Path) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of an exported directory, on the CPU."""
    from safetensors.torch import load_file

    tokenizer = load_tokenizer(directory)
    described = json.loads((directory / "config.json").read_text())
    if OURS not in described:
        return trained_model(directory, tokenizer), tokenizer
    fields = dict(described[OURS])
    check_tokenizer(directory, fields.pop("tokenizer_fingerprint"), tokenizer)
    config = GPTConfig(**fields)
    theirs = load_file(directory / "model.safetensors")
    with torch.device("meta"):
        model = GPT(config)
    weights: dict[str, Tensor] = {ours: theirs[key] for ours, key in _names(config)}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False), tokenizer


def trained_model(directory: Path, tokenizer: Tokenizer) -> GPT:
    """The model that a stage has left, if it was trained with this tokenizer."""
    check_tokenizer(directory, read_config(directory)[1], tokenizer)
    return load_model(directory)


def is_exported(directory: Path) -> bool:
    return (directory / FILE).is_file() and (directory / "config.json").is_file()


def check_tokenizer(directory: Path, fingerprint: str, tokenizer: Tokenizer) -> None:
    """A model's ids mean something with its own tokenizer only."""
    if fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the model in {directory} was trained with tokenizer {fingerprint[:12]}, "
            f"but the one given is {tokenizer.fingerprint[:12]}; use the tokenizer it was trained with"
        )


def _names(config: GPTConfig) -> Iterator[tuple[str, str]]:
    """Each weight's name here and in transformers' NanoChatForCausalLM."""
    yield "wte.weight", "model.embed_tokens.weight"
    yield "lm_head.weight", "lm_head.weight"
    parts = {"c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_proj": "o_proj"}
    for i in range(config.n_layer):
        for ours, theirs in parts.items():
            yield f"blocks.{i}.attn.{ours}.weight", f"model.layers.{i}.self_attn.{theirs}.weight"
        yield f"blocks.{i}.mlp.c_fc.weight", f"model.layers.{i}.mlp.fc1.weight"
        yield f"blocks.{i}.mlp.c_proj.weight", f"model.layers.{i}.mlp.fc2.weight"


def _their_config(config: GPTConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "model_type": "nanochat",
        "architectures": ["NanoChatForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": HIDDEN_ACT,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": SOFTCAP,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.special("<|assistant_end|>"),
        "pad_token_id": tokenizer.special("<|assistant_end|>"),
        OURS: asdict(config) | {"tokenizer_fingerprint": tokenizer.fingerprint},
    }


def _tokenizer_config(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "additional_special_tokens": list(tokenizer.specials),
        "model_max_length": config.sequence_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    end = tokenizer.special("<|assistant_end|>")
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [end, tokenizer.bos],
        "pad_token_id": end,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 50,
        "max_new_tokens": 256,
    }
