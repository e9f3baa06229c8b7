"""Checkpoints under bad conditions: cut short anywhere, changed, of another shape, on a full disk."""

import dataclasses
import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tinytrain import WORLD, tiny_model

from nanochat_core.artifacts import store
from nanochat_core.machine.ranks import World
from nanochat_core.optim.schedule import Rates
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.train import checkpoint
from nanochat_core.train.checkpoint import Fault, Saver, TrainState
from nanochat_core.train.setup import new_state

Fresh = Callable[[], TrainState]


@pytest.fixture
def two(tmp_path: Path, fresh: Fresh) -> tuple[Path, TrainState]:
    """A directory with checkpoints of steps 1 and 2."""
    state = fresh()
    saver = Saver(tmp_path, WORLD, keep=5)
    for step in (1, 2):
        state.step = state.drawn = step
        state.cursor = {"next": step}
        with torch.no_grad():
            state.model.lm_head.weight.fill_(step)
        saver.save(state)
    saver.wait()
    return tmp_path, state


def resumed(directory: Path, fresh: Fresh) -> TrainState:
    state = fresh()
    Saver(directory, WORLD, keep=5).resume(state)
    return state


def test_the_newest_is_found(two: tuple[Path, TrainState], fresh: Fresh) -> None:
    state = resumed(two[0], fresh)
    assert (state.step, state.cursor) == (2, {"next": 2})
    assert (state.model.lm_head.weight == 2).all()


@pytest.mark.parametrize("name", ["model.safetensors", "rank_0.safetensors", "rank_0.json", "manifest.json"])
def test_a_file_cut_short_anywhere_leads_to_the_one_before(
    name: str, two: tuple[Path, TrainState], fresh: Fresh, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = two[0] / "checkpoints" / "step_00000002"
    whole = shutil.copytree(folder, tmp_path_factory.mktemp("whole") / folder.name)
    data = (folder / name).read_bytes()
    for size in sorted(
        {0, 1, 8, len(data) // 2, len(data.rstrip()) - 1}
    ):  # a missing last newline changes nothing
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(data[:size])
        assert resumed(two[0], fresh).step == 1, size


def test_one_flipped_bit_leads_to_the_one_before(two: tuple[Path, TrainState], fresh: Fresh) -> None:
    file = two[0] / "checkpoints" / "step_00000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    assert resumed(two[0], fresh).step == 1


def cut(directory: Path, *steps: int) -> None:
    for step in steps:
        file = directory / "checkpoints" / f"step_{step:08d}" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_a_damaged_one_is_written_again_when_its_step_comes(
    two: tuple[Path, TrainState], fresh: Fresh
) -> None:
    cut(two[0], 2)
    state, saver = fresh(), Saver(two[0], WORLD, keep=2)
    assert saver.resume(state) and state.step == 1
    state.step = 2
    saver.save(state)
    saver.wait()
    assert names(two[0]) == ["step_00000001", "step_00000002"]
    assert resumed(two[0], fresh).step == 2


def test_after_all_were_damaged_the_new_ones_are_kept(
    two: tuple[Path, TrainState], fresh: Fresh, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(two[0], 1, 2)
    state, saver = fresh(), Saver(two[0], WORLD, keep=2)
    assert not saver.resume(state)
    assert "no checkpoint is whole; they stay in" in capsys.readouterr().out
    for _ in range(2):
        saver.save(state)
        state.step += 1
    saver.wait()
    assert names(two[0]) == [  # what there was is not deleted: somebody may want to look
        "step_00000000", "step_00000001", "step_00000001.damaged", "step_00000002.damaged"
    ]  # fmt: skip
    assert resumed(two[0], fresh).step == 1


def test_a_disk_that_cannot_read_one_leads_to_the_one_before(
    two: tuple[Path, TrainState], fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.sha256

    def sick(path: Path) -> str:
        if path.parent.name == "step_00000002":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(store, "sha256", sick)
    assert resumed(two[0], fresh).step == 1


def test_saving_one_step_twice_writes_once(tmp_path: Path, fresh: Fresh) -> None:
    """The second time is not asked of the disk, where the ranks would see different things."""
    state, saver = fresh(), Saver(tmp_path, WORLD, keep=2)
    saver.save(state)
    saver.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    saver.save(state)
    saver.wait()
    assert not (tmp_path / "checkpoints").exists()


def test_a_folder_never_completed_is_not_a_checkpoint(two: tuple[Path, TrainState], fresh: Fresh) -> None:
    folder = two[0] / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / "step_00000003.part")
    assert resumed(two[0], fresh).step == 2
    assert not (folder / "step_00000003.part").exists()


def test_only_the_newest_are_kept(tmp_path: Path, fresh: Fresh) -> None:
    state, saver = fresh(), Saver(tmp_path, WORLD, keep=2)
    for step in range(5):
        state.step = step
        saver.save(state)
    saver.wait()
    assert [path.name for path in saver.found()] == ["step_00000004", "step_00000003"]


def test_a_full_disk_leaves_the_last_good_one(
    two: tuple[Path, TrainState], fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, state = two
    saver = Saver(directory, WORLD, keep=5)

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    state.step = 3
    saver.save(state)
    with pytest.raises(OSError, match="No space left"):
        saver.wait()
    assert not list((directory / "checkpoints").glob("*.part"))
    assert resumed(directory, fresh).step == 2


def test_a_model_of_another_shape_is_refused_in_a_sentence(
    two: tuple[Path, TrainState], tokenizer: Tokenizer
) -> None:
    other = new_state(tiny_model(tokenizer, "seed"), Rates(), WORLD)
    with pytest.raises(ValueError, match="another shape"):
        Saver(two[0], WORLD, keep=5).resume(other)


def test_what_is_saved_is_the_state_of_that_moment(tmp_path: Path, fresh: Fresh) -> None:
    state, saver = fresh(), Saver(tmp_path, WORLD, keep=2)
    before = state.model.lm_head.weight.detach().clone()
    saver.save(state)
    with torch.no_grad():
        state.model.lm_head.weight.add_(1.0)  # the next step, while the thread may still write
    saver.wait()
    assert torch.equal(resumed(tmp_path, fresh).model.lm_head.weight, before)


class FirstOfTwo(World):
    """Rank 0 of 2 whose neighbour agrees with it and writes nothing by itself."""

    def sum(self, *values: float) -> list[float]:
        return list(values)


TWO = FirstOfTwo(0, 2, WORLD.device, WORLD.dtype)


def test_a_rank_that_is_gone_is_not_waited_for(tmp_path: Path, fresh: Fresh) -> None:
    saver = Saver(tmp_path, TWO, keep=5)
    saver.save(fresh())
    began = time.monotonic()
    saver.give_up()
    saver.wait()
    assert time.monotonic() - began < 60 and saver.found() == []


def test_the_other_rank_touches_nothing_in_the_folder_after_its_record(
    tmp_path: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank renames the folder as soon as it sees that file."""
    second, first = Saver(tmp_path, dataclasses.replace(TWO, rank=1), keep=5), Saver(tmp_path, TWO, keep=5)
    replace = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        done = replace(path, target)
        if target.name == "rank_1.json":
            first.wait()
        return done

    monkeypatch.setattr(Path, "replace", replaced)
    state = fresh()
    first.save(state)
    second.save(state)
    second.wait()
    assert names(tmp_path) == ["step_00000000"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["wte.weight", "wte.weight/square"])
def test_a_state_that_is_not_finite_is_not_saved(
    where: str, value: float, tmp_path: Path, fresh: Fresh
) -> None:
    state, saver = fresh(), Saver(tmp_path, WORLD, keep=2)
    tensor = (state.model.state_dict() | state.optimizer.state_dict())[where]
    tensor.view(-1)[7] = value
    with pytest.raises(Fault, match=f"{where} is not finite"):
        saver.save(state)
    assert not (tmp_path / "checkpoints").exists()
