import dataclasses
import math
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from nanochat_core.artifacts.stage import Later, Recipe, Stage, canonical, fingerprint


class Small(Recipe):
    depth: int = 4
    lr: float = 0.02
    name: str | None = None
    mixture: dict[str, float] = {"a": 1.0, "b": 2.0}  # noqa: RUF012  pydantic copies it
    inner: tuple[int, ...] = (1, 2)


STAGE = Stage("pretrain", SimpleNamespace(Config=Small, run=None))


def test_a_fingerprint_is_the_same_in_every_process_and_version() -> None:
    # A changed digest here orphans every artefact anybody has made.
    assert fingerprint(STAGE, Small(), {"text": "abc"}) == "0f8f82623d9730c062c5"


def test_a_key_that_came_later_counts_only_when_it_is_set() -> None:
    class Grown(Small):
        clip: Annotated[float | None, Later] = None

    assert fingerprint(STAGE, Grown(), {}) == fingerprint(STAGE, Small(), {})
    assert fingerprint(STAGE, Grown(clip=1.0), {}) != fingerprint(STAGE, Small(), {})


def test_the_order_of_a_mapping_does_not_matter() -> None:
    one, other = Small(mixture={"a": 1.0, "b": 2.0}), Small(mixture={"b": 2.0, "a": 1.0})
    assert fingerprint(STAGE, one, {}) == fingerprint(STAGE, other, {})


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(STAGE, name="mid"),
        dataclasses.replace(STAGE, version=2),
    ],
)
def test_name_and_version_are_part_of_the_identity(other: Stage) -> None:
    assert fingerprint(other, Small(), {}) != fingerprint(STAGE, Small(), {})


def test_config_and_inputs_are_part_of_the_identity() -> None:
    base = fingerprint(STAGE, Small(), {"text": "abc"})
    assert fingerprint(STAGE, Small(depth=5), {"text": "abc"}) != base
    assert fingerprint(STAGE, Small(), {"text": "abd"}) != base
    assert fingerprint(STAGE, Small(), {"other": "abc"}) != base


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [{1, 2}, b"bytes", Path("x"), Colour.RED, lambda: 1, object(), 1j, math.nan, math.inf, {1: "a"}],
)
def test_what_has_no_stable_form_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="recipe"):
        canonical(value)


def test_the_refusal_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"pretrain\.mixture\.b"):
        canonical({"mixture": {"b": {1}}}, "pretrain")


def test_a_recipe_is_frozen_and_knows_its_keys() -> None:
    with pytest.raises(ValidationError):
        Small().depth = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Small.model_validate({"deth": 5})
