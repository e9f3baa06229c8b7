"""Load a finished model and have a conversation with it.

    python examples/chat_with_a_run.py [MODEL] [QUESTION ...]

MODEL is a stage of the latest run (sft), or a directory that `save` or `nanochat export` wrote; by default
the last stage of the latest run. To make a run first: nanochat run cpu-demo
"""

import sys

from nanochat_core import Engine, Message, Sampling, load

QUESTIONS = ("What is the capital of France?", "And of Japan?")


def main(model: str | None, questions: tuple[str, ...]) -> None:
    name, gpt, tokenizer = load(model)
    print(f"{name}: {gpt.num_params():,} parameters, {tokenizer.vocab_size} tokens in the vocabulary")
    engine = Engine(gpt, tokenizer)

    messages: list[Message] = []
    for seed, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        answer = engine.reply(messages, Sampling(temperature=0.6, top_k=50, max_tokens=64, seed=seed))
        messages.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, tuple(sys.argv[2:]) or QUESTIONS)
