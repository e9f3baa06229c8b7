"""What a stage's process said last, told as the reason it ended."""

from pathlib import Path

from nanochat_core.runner.exits import last_words

ONLY_LOST = "error: RuntimeError: gloo/transport/tcp/pair.cc:561 Connection closed by peer [127.0.0.1]:19882"


def test_of_several_ranks_the_one_that_failed_is_heard_though_it_spoke_second(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        f"step 3\n{ONLY_LOST}\nerror: ValueError: row 7 of a.parquet is not text\nthe launcher's own\n"
    )
    assert last_words(log, 0, 1) == "ValueError: row 7 of a.parquet is not text"


def test_a_lost_neighbour_is_the_reason_if_nobody_gives_another(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(f"{ONLY_LOST}\n")
    assert "Connection closed by peer" in last_words(log, 0, 1)


def test_what_an_earlier_attempt_said_is_not_the_reason_of_this_one(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("error: an old one\n")
    begin = log.stat().st_size
    assert last_words(log, begin, 3) == "its process ended with code 3 and no message"
