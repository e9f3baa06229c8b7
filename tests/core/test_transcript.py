"""The transcript's chain: what was appended is read back, and whatever else happens to it is noticed."""

from pathlib import Path

import pytest

from nanochat_core.artifacts import transcript
from nanochat_core.artifacts.store import Damaged


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for step in (0, 4, 8):
        transcript.append(tmp_path, {"step": step, "weights": f"{step:x}"})
    return tmp_path


def test_lines_come_back_in_their_order(three: Path) -> None:
    assert [line["step"] for line in transcript.read(three)] == [0, 4, 8]
    assert transcript.read(three / "nothing") == []


@pytest.mark.parametrize("change", ["changed", "removed", "swapped", "cut"])
def test_a_chain_breaks_where_it_was_touched(change: str, three: Path) -> None:
    path = three / transcript.FILE
    lines = path.read_text().splitlines()
    lines = {
        "changed": [lines[0].replace('"0"', '"1"'), *lines[1:]],
        "removed": [lines[0], lines[2]],
        "swapped": [lines[0], lines[2], lines[1]],
        "cut": [lines[0], lines[1][:-9], lines[2]],
    }[change]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(Damaged, match=r"breaks at line 2"):
        transcript.read(three)
