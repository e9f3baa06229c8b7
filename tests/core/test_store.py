import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat_core.artifacts import store


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    """A finished directory with a file, one in a folder, one shared, and scratch that is to go."""
    directory = tmp_path / "pretrain" / "abc"
    (directory / "sub").mkdir(parents=True)
    (directory / "checkpoints" / "step_00000001").mkdir(parents=True)
    (directory / "checkpoints" / "step_00000001" / "state").write_text("x")
    (directory / "model.bin").write_text("weights")
    (directory / "sub" / "more.txt").write_text("more")
    (directory / "half.part").write_text("half")
    (directory / "log.txt").write_text("said")
    (tmp_path / "shared.bin").write_text("shared")
    store.commit(directory, tmp_path, {"loss": 1.0}, {tmp_path / "shared.bin"}, 2.0, {}, None, {})
    return directory


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_finished_artefact_verifies_and_lists_what_it_holds(artefact: Path, tmp_path: Path) -> None:
    result = store.verify(artefact, tmp_path, hashes=True)
    assert result is not None
    assert set(result["files"]) == {"model.bin", "sub/more.txt"}
    assert set(result["shared"]) == {"shared.bin"}
    assert not (artefact / "checkpoints").exists()


def test_a_metric_that_is_not_finite_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_bpb came out as inf"):
        store.commit(tmp_path, tmp_path, {"val_bpb": float("inf")}, set(), 1.0, {}, None, {})
    assert not list(tmp_path.iterdir())


def test_an_unfinished_directory_is_no_artefact(tmp_path: Path) -> None:
    assert store.verify(tmp_path, tmp_path) is None
    assert store.verify(tmp_path / "nowhere", tmp_path) is None


@pytest.mark.parametrize("name", ["model.bin", "sub/more.txt"])
def test_a_deleted_file_is_damage(artefact: Path, tmp_path: Path, name: str) -> None:
    (artefact / name).unlink()
    with pytest.raises(store.Damaged, match=f"{name} is missing"):
        store.verify(artefact, tmp_path)


def test_a_truncated_file_is_damage(artefact: Path, tmp_path: Path) -> None:
    os.truncate(artefact / "model.bin", 3)
    with pytest.raises(store.Damaged, match=r"model\.bin has 3 bytes, not 7"):
        store.verify(artefact, tmp_path)


def test_a_shared_file_is_verified_with_the_rest(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "shared.bin").unlink()
    with pytest.raises(store.Damaged, match=r"shared\.bin is missing"):
        store.verify(artefact, tmp_path)


def test_a_flipped_bit_is_found_by_its_hash_only(artefact: Path, tmp_path: Path) -> None:
    (artefact / "model.bin").write_text("weighty")
    assert store.verify(artefact, tmp_path) is not None
    with pytest.raises(store.Damaged, match="hash"):
        store.verify(artefact, tmp_path, hashes=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00\x01", '{"format": 1}'])
def test_a_record_that_cannot_be_read_is_damage(artefact: Path, tmp_path: Path, text: str) -> None:
    (artefact / "result.json").write_text(text)
    with pytest.raises(store.Damaged):
        store.verify(artefact, tmp_path)


def test_a_newer_artefact_is_refused_and_says_what_to_do(artefact: Path, tmp_path: Path) -> None:
    edit(artefact / "result.json", format=store.FORMAT + 1)
    with pytest.raises(store.Newer, match=r"newer nanochat.*update"):
        store.verify(artefact, tmp_path)


def test_a_moved_base_directory_still_verifies(artefact: Path, tmp_path: Path) -> None:
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert store.verify(moved / "pretrain" / "abc", moved, hashes=True) is not None


def test_content_tells_apart_what_was_made_from_what_it_took(artefact: Path, tmp_path: Path) -> None:
    result = store.verify(artefact, tmp_path)
    assert result is not None
    later = result | {"seconds": 99.0, "finished": "2030-01-01T00:00:00Z", "metrics": {"tokens_per_s": 5.0}}
    other = result | {"files": result["files"] | {"model.bin": {"size": 7, "sha256": "0" * 64}}}
    assert store.content(later) == store.content(result)
    assert store.content(other) != store.content(result)


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "state"
    store.write_whole(target, "old")
    script = (
        "import os, sys; from pathlib import Path; from nanochat_core.artifacts import store;"
        "Path.replace = lambda *a: os.kill(os.getpid(), 9);"
        "store.write_whole(Path(sys.argv[1]), 'new')"
    )
    assert subprocess.run([sys.executable, "-c", script, str(target)]).returncode == -9
    assert target.read_text() == "old"


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from nanochat_core.artifacts import store\n"
        "with store.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "locks" / "a.lock"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with store.locked(path, wait=False) as held:
            assert not held
        holder.kill()
        holder.wait()
    with store.locked(path, wait=False) as held:
        assert held


def test_time_spent_counts_a_killed_attempt_to_its_last_sign_of_life() -> None:
    attempts = [
        {"event": "started", "time": 100.0, "previous_end": 0.0},
        {"event": "started", "time": 500.0, "previous_end": 130.0},  # the first was killed at about 130
        {"event": "stopped", "time": 520.0, "why": "interrupted"},
        {"event": "started", "time": 900.0, "previous_end": 520.0},
        {"event": "finished", "time": 910.0},
    ]
    assert store.seconds_spent(attempts) == 30 + 20 + 10


def test_a_change_of_what_it_was_made_from_is_noticed_and_a_mere_touch_is_not(
    tmp_path: Path,
) -> None:
    mine, directory = tmp_path / "mine", tmp_path / "stage" / "f"
    mine.mkdir()
    directory.mkdir(parents=True)
    (mine / "a.txt").write_text("one")
    (mine / "b.txt").write_text("two")
    origins = {str(mine): store.origin(mine, (".txt",))}
    store.commit(directory, tmp_path, {}, set(), 1.0, {}, None, origins)
    (mine / "a.txt").touch()
    (mine / "notes.md").write_text("of no interest")
    assert store.verify(directory, tmp_path) is not None

    def noticed(name: str) -> None:
        with pytest.raises(store.Damaged, match=rf"{name}, which it was made from, has changed"):
            store.verify(directory, tmp_path)

    (mine / "a.txt").write_text("eno")  # as long as it was
    noticed("a.txt")
    (mine / "a.txt").write_text("one")
    (mine / "c.txt").write_text("three")
    noticed("c.txt")
    (mine / "c.txt").unlink()
    (mine / "b.txt").rename(tmp_path / "b.txt")
    noticed("b.txt")
    (tmp_path / "b.txt").rename(mine / "b.txt")
    assert store.verify(directory, tmp_path) is not None
    mine.rename(tmp_path / "taken out")
    assert store.verify(directory, tmp_path) is not None
