"""The direction of imports, and what importing must not load."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "nanochat_core"

# Each package may import itself and those below it; within one line, none imports another.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("runner",),
    ("pipeline",),
    ("stages",),
    ("report", "chat"),
    ("train",),
    ("eval",),
    ("data",),
    ("infer", "sources", "optim"),
    ("model", "tokenizer"),
    ("machine",),
    ("artifacts",),
)
HEAVY = {
    "torch",
    "prefect",
    "pyarrow",
    "matplotlib",
    "datasets",
    "fastapi",
    "transformers",
    "tiktoken",
    "numpy",
}


def imports(path: Path, *, top: bool = False) -> Iterator[str]:
    """Every module a file imports (with `top`, only on being imported itself), as a dotted name."""
    package = path.relative_to(ROOT).with_suffix("").parts
    nodes = ast.walk(ast.parse(path.read_text())) if not top else on_import(ast.parse(path.read_text()).body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            for inner in ("body", "orelse", "handlers", "finalbody"):
                yield from on_import(getattr(node, inner, []))


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def layer(name: str) -> int | None:
    """The height of `nanochat_core.<name>...`; None if the module is in no layer."""
    parts = name.split(".")
    if len(parts) < 2 or parts[0] != "nanochat_core":
        return None
    return next((i for i, names in enumerate(LAYERS) if parts[1] in names), None)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_lower_never_imports_higher() -> None:
    for path in sources("nanochat_core"):
        if path.parent == CORE and path.stem in ("__init__", "__main__"):
            continue
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        here = layer(own)
        assert here is not None, f"{shown(path)} belongs to no layer; give it one in {__file__}"
        for name in imports(path):
            there = layer(name)
            same = name.split(".")[:2] == own.split(".")[:2]
            assert there is None or there > here or same, (
                f"{shown(path)} imports {name}, which is not below it"
            )


def test_only_the_command_line_imports_flows_and_nothing_imports_prefect() -> None:
    for path in sources("nanochat_core"):
        foreign = {"prefect"} if path.parent.name == "cli" else {"prefect", "flows"}
        for name in imports(path):
            assert name.split(".")[0] not in foreign, f"{shown(path)} imports {name}"


def test_commands_of_this_python_are_made_in_one_place() -> None:
    """Elsewhere somebody would forget -P; the sandbox has -I."""
    places = {
        shown(path)
        for path in sources("nanochat_core", "flows")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable"
    }
    assert places == {"nanochat_core/machine/installed.py", "nanochat_core/infer/sandbox.py"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = distributions(project["dependencies"])
    optional = distributions(line for extra in project["optional-dependencies"].values() for line in extra)
    used = {name.split(".")[0] for path in sources("nanochat_core", "flows") for name in imports(path)}
    made_of = packages_distributions()
    imported = set()
    for name in used - sys.stdlib_module_names - {"flows", "nanochat_core"}:
        found = distributions(made_of[name])
        assert found & (always | optional), f"{name} is imported; declare {' or '.join(sorted(found))}"
        imported |= found
    assert always - {"httpx"} <= imported  # what Prefect imports of it, with SOCKS


def distributions(lines: Iterable[str]) -> set[str]:
    """The normalised names that requirements begin with."""
    return {re.sub("[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower() for line in lines}


def test_the_top_level_holds_the_table_and_packages() -> None:
    loose = {path.stem for path in CORE.glob("*.py")} - {"__init__", "__main__"}
    assert loose == {"pipeline"}


@pytest.mark.parametrize("path", sources("nanochat_core/model"), ids=shown)
def test_the_model_imports_only_torch(path: Path) -> None:
    allowed = {"torch", "nanochat_core", "safetensors", *sys.stdlib_module_names}
    for name in imports(path):
        assert name.split(".")[0] in allowed, f"{shown(path)} imports {name}"


@pytest.mark.parametrize("path", sources("nanochat_core/stages"), ids=shown)
def test_stages_load_what_is_heavy_only_when_they_run(path: Path) -> None:
    for name in imports(path, top=True):
        assert name.split(".")[0] not in HEAVY, f"{shown(path)} imports {name} on being imported"


def test_the_table_is_cheap_to_import() -> None:
    modules = "nanochat_core.pipeline, nanochat_core.runner.launch, nanochat_core.runner.status"
    code = f"import sys, {modules}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_flow_does_not_load_torch() -> None:
    code = "import sys, flows.speedrun; print(sorted({'torch', 'pyarrow', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", sources("nanochat_core", "flows"), ids=shown)
def test_a_file_opens_with_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{shown(path)} has no docstring"


# Names of stages that are words for other things too: a role that is read ("tokenizer", "assets"), a list in
# a file of ours ("shards"), the key of an artefact in Prefect ("report"), a verb ("export"). As such they are
# allowed; as keys of a run's jobs or rows they are not.
WORDS = {"assets", "export", "report", "shards", "tokenizer"}
BY_STAGE = ("jobs", "latest", "rows", "table")  # the ends of names of mappings from stages


def stage_names_in(text: str, names: set[str]) -> Iterator[tuple[int, str]]:
    """The line and the name of each string that can only mean a stage."""
    for node in ast.walk(ast.parse(text)):
        mapping: ast.expr | None = None
        match node:
            case ast.Constant(value=str(key)) if key not in WORDS:
                pass
            case ast.Subscript(value=mapping, slice=ast.Constant(value=str(key))):
                pass
            case ast.Compare(left=ast.Constant(value=str(key)), comparators=[mapping]):
                pass
            case ast.Call(func=ast.Attribute(mapping, "get"), args=[ast.Constant(value=str(key)), *_]):
                pass
            case _:
                continue
        keyed = mapping is not None and ast.unparse(mapping).rstrip(")}").endswith(BY_STAGE)
        if key in names and (keyed if key in WORDS else mapping is None):
            yield node.lineno, key


def test_only_the_table_and_the_stages_themselves_name_a_stage() -> None:
    from nanochat_core.pipeline import STAGES

    names = {stage.name for stage in STAGES}
    for path in sources("nanochat_core", "flows"):
        if path.parent != CORE / "stages" and path != CORE / "pipeline.py":
            found = list(stage_names_in(path.read_text(), names))
            assert not found, f"{shown(path)} names stages: {found}; their rows declare what it needs to know"


@pytest.mark.parametrize(
    "line", ['x = "sft"', 'jobs["sft"]', 'plan.jobs["report"]', '"report" in plan.jobs', 'rows.get("assets")']
)
def test_a_stage_named_in_any_way_is_found(line: str) -> None:
    assert len(list(stage_names_in(line, {"sft", "report", "assets"}))) == 1


@pytest.mark.parametrize("line", ['f(key="report")', 'job.inputs["assets"]', 'x = {"report": 1}'])
def test_a_role_or_key_of_the_same_name_is_none(line: str) -> None:
    assert list(stage_names_in(line, {"sft", "report", "assets"})) == []


def test_a_class_name_means_one_thing() -> None:
    """But `Config`: every stage's module has one, as `run` it is how the table calls it."""
    places: dict[str, list[str]] = {}
    for path in sources("nanochat_core", "flows"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and (node.name != "Config" or path.parent.name != "stages"):
                places.setdefault(node.name, []).append(shown(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_a_file_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in sources("nanochat_core", "flows"):
        if not path.stem.startswith("__"):
            places.setdefault(path.stem, []).append(shown(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}
