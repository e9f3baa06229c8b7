# The tasks of this repository: `uv run just` lists them. `just` is a development dependency.

uv := "uv run --frozen"

# list the tasks
default:
    @just --list --unsorted

# what a commit must pass: lint, format, types, Rust format
check:
    {{ uv }} ruff check .
    {{ uv }} ruff format --check .
    {{ uv }} mypy
    {{ uv }} mypy examples
    cargo fmt --manifest-path rustbpe/Cargo.toml --check

# repair what can be repaired without thinking
fix:
    {{ uv }} ruff check --fix .
    {{ uv }} ruff format .
    cargo fmt --manifest-path rustbpe/Cargo.toml

# the tests; `just test tests/core/train` for some of them
test *args:
    {{ uv }} pytest {{ args }}

# the tests that take minutes
slow *args:
    {{ uv }} pytest -m slow --timeout 900 {{ args }}

# what the documents promise: links, and the code they show
docs:
    {{ uv }} pytest tests/test_docs.py tests/test_examples.py tests/core/data/test_documented_task.py tests/flows/test_worked_example.py

# the Rust checks that need a compiler
rust:
    cargo clippy --manifest-path rustbpe/Cargo.toml --all-targets --locked -- -D warnings
    cargo clippy --manifest-path rustbpe/Cargo.toml --all-targets --locked --features python -- -D warnings
    cargo test --manifest-path rustbpe/Cargo.toml --locked

# everything CI does
ci:
    .ci/run

# run `just check` before every commit in this clone
hooks:
    {{ uv }} pre-commit install

# print the changelog of a version (default: this one; Unreleased if it has no section yet)
release-notes version="":
    @{{ uv }} python .ci/release.py notes {{ version }}

# set the version, date its changelog section, commit and tag: just release 0.2.0
release version:
    {{ uv }} python .ci/release.py cut {{ version }}
