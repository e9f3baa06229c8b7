"""The library: `from nanochat_core import GPT, Engine, fit, load`. docs/using-the-library.md shows it in use.

A name is imported when it is first asked for, so that `import nanochat_core` loads neither torch nor pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanochat_core.data.batch import Batch
    from nanochat_core.data.streams import conversation_batches, text_batches
    from nanochat_core.data.tasks import load_task
    from nanochat_core.data.tasks.base import Problem, Rows, Task, dialogue
    from nanochat_core.eval.chat_tasks import accuracy, evaluate_task
    from nanochat_core.infer.engine import Engine
    from nanochat_core.infer.exported import save
    from nanochat_core.infer.sampling import Sampling
    from nanochat_core.model.gpt import GPT
    from nanochat_core.model.shape import GPTConfig
    from nanochat_core.optim.groups import Group, parameter_groups
    from nanochat_core.optim.schedule import Rates, Schedule
    from nanochat_core.runner.models import load
    from nanochat_core.tokenizer.bpe import Tokenizer
    from nanochat_core.tokenizer.bpe import train as train_tokenizer
    from nanochat_core.tokenizer.render import Message
    from nanochat_core.train.loop import Hook
    from nanochat_core.train.script import fit

__all__ = [
    "GPT",
    "Batch",
    "Engine",
    "GPTConfig",
    "Group",
    "Hook",
    "Message",
    "Problem",
    "Rates",
    "Rows",
    "Sampling",
    "Schedule",
    "Task",
    "Tokenizer",
    "accuracy",
    "conversation_batches",
    "dialogue",
    "evaluate_task",
    "fit",
    "load",
    "load_task",
    "parameter_groups",
    "save",
    "text_batches",
    "train_tokenizer",
]

HOMES = {
    "GPT": "model.gpt",
    "Batch": "data.batch",
    "Engine": "infer.engine",
    "GPTConfig": "model.shape",
    "Group": "optim.groups",
    "Hook": "train.loop",
    "Message": "tokenizer.render",
    "Problem": "data.tasks.base",
    "Rates": "optim.schedule",
    "Rows": "data.tasks.base",
    "Sampling": "infer.sampling",
    "Schedule": "optim.schedule",
    "Task": "data.tasks.base",
    "Tokenizer": "tokenizer.bpe",
    "accuracy": "eval.chat_tasks",
    "conversation_batches": "data.streams",
    "dialogue": "data.tasks.base",
    "evaluate_task": "eval.chat_tasks",
    "fit": "train.script",
    "load": "runner.models",
    "load_task": "data.tasks",
    "parameter_groups": "optim.groups",
    "save": "infer.exported",
    "text_batches": "data.streams",
    "train_tokenizer": "tokenizer.bpe:train",
}
"""Public name -> module below this package, and the name there if it is another."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"nanochat_core has no {name!r}; it has {', '.join(__all__)}")
    module, _, own = HOMES[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), own or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
