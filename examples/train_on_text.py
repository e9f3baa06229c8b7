"""Train a tokenizer and a tiny model on a text file, sample the model and save it.

    python examples/train_on_text.py [FILE] [DIRECTORY]

FILE is by default this repository's README, DIRECTORY `my-model`. Takes seconds on a CPU.
"""

import sys
from pathlib import Path

from nanochat_core import GPT, Engine, GPTConfig, Sampling, fit, save, text_batches, train_tokenizer


def main(file: Path, directory: Path) -> None:
    documents = file.read_text(encoding="utf-8").split("\n\n")
    tokenizer = train_tokenizer(documents, vocab_size=512)
    shape = GPTConfig.of_depth(2, tokenizer.vocab_size, sequence_len=64, aspect=32, head_dim=32)
    model = GPT(shape).init_weights(seed=1)
    print(f"{model.num_params():,} parameters, {len(documents)} documents of {file.name}")

    # 100 steps of 8 rows x 64 tokens
    history = fit(model, text_batches(documents, tokenizer, rows=8, T=64), steps=100)
    print(f"loss {history[0]['loss']:.2f} -> {history[-1]['loss']:.2f} nats per token")

    engine = Engine(model, tokenizer)
    for prompt in ("The ", "A model"):
        print(prompt + engine.continue_text(prompt, Sampling(temperature=0.7, max_tokens=40)))

    save(model, tokenizer, directory)
    print(f"saved; try: python examples/chat_with_a_run.py {directory}")


if __name__ == "__main__":
    readme = Path(__file__).parents[1] / "README.md"
    file, directory = [*sys.argv[1:3], *(str(readme), "my-model")[len(sys.argv[1:3]) :]]
    main(Path(file), Path(directory))
