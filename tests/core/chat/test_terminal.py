"""The terminal: one prompt, a conversation, its commands, and a Ctrl-C that stops the answer only."""

import io
import json
from collections.abc import Iterator

import pytest

from nanochat_core.chat.conversation import AnswerDelta, Detokenizer, fit, parts
from nanochat_core.chat.terminal import run_terminal
from nanochat_core.infer.engine import Engine
from nanochat_core.infer.load import Loaded
from nanochat_core.tokenizer.render import render_for_completion


@pytest.fixture
def load(parrot, tokenizer):
    """A model that always answers `so 12*3 36 ok`, with a call of the calculator in it."""
    special, encode = tokenizer.special, tokenizer.encode
    model = parrot(
        [
            *(special("<|assistant_start|>"), *encode("so")),
            *(special("<|python_start|>"), *encode("12*3"), special("<|python_end|>")),
        ],
        [special("<|output_end|>"), *encode(" ok"), special("<|assistant_end|>")],
    )

    def load(name: str | None) -> Loaded:
        if name == "absent":
            raise ValueError("there is no model called absent")
        return Loaded(name or "sft", model, tokenizer)

    return load


def typed(monkeypatch, *lines: str) -> None:
    """As if the user typed these lines and then Ctrl-D."""
    waiting = iter(lines)

    def read(_: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})())


def test_one_prompt_gives_one_answer_with_the_call_in_it(load, capsys) -> None:
    run_terminal(load, prompt="what?", temperature=0)
    assert capsys.readouterr().out == "so[calculator 12*3 = 36] ok\n"


def test_a_piped_question_is_answered(load, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n"))
    run_terminal(load, temperature=0)
    assert capsys.readouterr().out == "so[calculator 12*3 = 36] ok\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(ValueError, match="empty"):
        run_terminal(load)


def test_a_conversation_is_remembered_saved_and_cleared(load, capsys, monkeypatch, tmp_path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    typed(monkeypatch, "one", f"/save {first}", "/clear", f"/save {second}", "/nonsense", "/save /no/where")
    run_terminal(load, temperature=0)
    messages = json.loads(first.read_text())["messages"]
    assert messages[0] == {"role": "user", "content": "one"}
    assert [part["type"] for part in messages[1]["content"]] == ["text", "python", "python_output", "text"]
    assert json.loads(second.read_text()) == {"messages": []}
    out = capsys.readouterr().out
    assert "/nonsense is not a command" in out and "/no/where cannot be written" in out


def test_commands_change_the_settings_and_mistakes_change_nothing(load, capsys, monkeypatch) -> None:
    typed(
        monkeypatch, "/temperature 0", "/topk 7", "/topk x", "/temperature -1", "/model absent", "/model rl"
    )
    run_terminal(load)
    out = capsys.readouterr().out
    assert "wants a whole number, not 'x'" in out and "temperature is -1" in out
    assert "no model called absent" in out and "now talking to rl" in out
    typed(monkeypatch, "/topk 0", "/help", "/quit", "never read")
    run_terminal(load)
    assert "(now None)" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_not_the_program(load, capsys, monkeypatch, tmp_path) -> None:
    stream = Engine.stream

    def interrupted(self, *args) -> Iterator[int]:
        yield from [token for token, _ in zip(stream(self, *args), range(2), strict=False)]
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", interrupted)
    typed(monkeypatch, "^C", "hello", f"/save {tmp_path / 'talk.json'}")
    run_terminal(load, temperature=0)
    assert "so [stopped]" in capsys.readouterr().out
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][1]["content"][0]["text"] == "so"
    with pytest.raises(KeyboardInterrupt):
        run_terminal(load, prompt="hello", temperature=0)


def test_an_answer_cannot_steer_the_terminal(parrot, tokenizer, capsys) -> None:
    start, end = tokenizer.special("<|assistant_start|>"), tokenizer.special("<|assistant_end|>")
    model = parrot([start, *tokenizer.encode("a\x1b]0;\x07b\tc\n"), end])
    run_terminal(lambda _: Loaded("m", model, tokenizer), prompt="hi", temperature=0)
    assert capsys.readouterr().out == "a\ufffd]0;\ufffdb\tc\n\n"


def test_a_long_conversation_slides_by_whole_exchanges(tokenizer) -> None:
    messages = [{"role": "system", "content": "be kind"}]
    for i in range(9):
        messages += [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
    messages.append({"role": "user", "content": "last"})
    kept = fit(tokenizer, messages, context=80, answer=20)
    assert len(kept) <= 60
    tail = [messages[0], *messages[-5:]]
    while len(render_for_completion(tokenizer, {"messages": tail})) <= 60:
        expected = render_for_completion(tokenizer, {"messages": tail})
        tail = [messages[0], *messages[-len(tail) - 1 :]]
    assert kept == expected
    with pytest.raises(ValueError, match="the last message is too long"):
        fit(tokenizer, messages, context=20, answer=20)


def test_text_comes_at_whole_characters_only(tokenizer) -> None:
    reader = Detokenizer(tokenizer)
    text = "é日🙂x"
    pieces = [reader.read(token) for token in tokenizer.encode(text)]
    assert "".join(piece.text for some in pieces for piece in some) == text
    assert all("\ufffd" not in piece.text for some in pieces for piece in some)
    reader.read(tokenizer.encode("🙂")[0])
    assert reader.end() == [AnswerDelta("text", "\ufffd")]
    assert parts([]) == [{"type": "text", "text": ""}]
