"""What `from nanochat_core import ...` offers."""

import ast
from pathlib import Path

import pytest

import nanochat_core


def told_to_type_checkers() -> dict[str, str]:
    """Public name -> home, from the imports under TYPE_CHECKING."""
    assert nanochat_core.__file__ is not None
    found = {}
    for node in ast.walk(ast.parse(Path(nanochat_core.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanochat_core."):
            for alias in node.names:
                home = str(node.module).removeprefix("nanochat_core.")
                found[alias.asname or alias.name] = home + (f":{alias.name}" if alias.asname else "")
    return found


def test_names_at_run_time_are_those_that_type_checkers_see() -> None:
    assert told_to_type_checkers() == nanochat_core.HOMES
    assert sorted(nanochat_core.HOMES) == sorted(nanochat_core.__all__)


@pytest.mark.parametrize("name", nanochat_core.__all__)
def test_every_public_name_exists_and_says_what_it_is(name: str) -> None:
    assert getattr(nanochat_core, name).__doc__
    assert name in dir(nanochat_core)


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no 'Trainer'; it has .*fit"):
        _ = nanochat_core.Trainer
