"""Define a task, train a tiny model on it, and grade the model on numbers that it has not seen.

A task is numbered conversations that end in the right answer, and a rule that grades another answer. The
same task can be trained on, evaluated and rewarded. docs/tasks.md says how profiles get to use it by name.
"""

from nanochat_core import (
    GPT,
    Engine,
    GPTConfig,
    Problem,
    Rows,
    accuracy,
    conversation_batches,
    dialogue,
    evaluate_task,
    fit,
    train_tokenizer,
)

TRAIN = [n for n in range(2000) if n % 7]
TEST = [n for n in range(2000) if n % 7 == 0]  # never trained on


def parity(name: str, numbers: list[int]) -> Rows:
    """Is a number odd or even? An answer is right if it is the same text, which is the default rule."""

    def row(index: int) -> Problem:
        n = numbers[index]
        return dialogue(f"Odd or even: {n}", "odd" if n % 2 else "even")

    return Rows(name, len(numbers), row, baseline=0.5)


def main() -> None:
    train, test = parity("parity-train", TRAIN), parity("parity-test", TEST)
    tokenizer = train_tokenizer(["Odd or even: odd even"], vocab_size=280)  # digits stay single tokens
    shape = GPTConfig.of_depth(2, tokenizer.vocab_size, sequence_len=32, aspect=32, head_dim=32)
    model = GPT(shape).init_weights(seed=1)
    engine = Engine(model, tokenizer)

    print(f"before: {accuracy(evaluate_task(engine, test, max_tokens=8)):.2f} (a guess: {test.baseline})")
    history = fit(model, conversation_batches(train, tokenizer, rows=8, T=32), steps=50)
    print(f"loss {history[0]['loss']:.2f} -> {history[-1]['loss']:.2f} nats per token")

    answers = evaluate_task(engine, test, max_tokens=8)
    print(f"after:  {accuracy(answers):.2f}")
    for answer in answers[:3]:
        print(f"  {test[answer.problem]['messages'][0]['content']} {answer.said[0]}")


if __name__ == "__main__":
    main()
