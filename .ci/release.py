"""Release notes out of CHANGELOG.md, and a new version of the project.

    python .ci/release.py notes [VERSION]    prints a version's section; Unreleased if it has none yet
    python .ci/release.py cut VERSION        sets the version, names the Unreleased section, commits and tags

`cut` pushes nothing: git push --follow-tags
"""

import datetime
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNRELEASED = "Unreleased"


def current(root: Path) -> str:
    return str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])


def sections(changelog: str) -> dict[str, str]:
    """Version -> its section's text, newest first. Headings: `## 0.1.0 (2026-11-27)`, `## Unreleased`."""
    parts = re.split(r"^## (\S+).*\n", changelog, flags=re.M)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def notes(root: Path, version: str) -> str:
    found = sections((root / "CHANGELOG.md").read_text())
    text = found.get(version) or (found.get(UNRELEASED) if version == current(root) else None)
    if not text:
        raise ValueError(f"CHANGELOG.md has no section with text for {version}; it has {', '.join(found)}")
    return text


def cut(root: Path, version: str, today: datetime.date) -> None:
    def run(*command: str) -> str:
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout

    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"{version!r} is not a version; write it like 0.2.0")
    if run("git", "status", "--porcelain"):
        raise ValueError("there are uncommitted changes; commit or stash them first")
    if run("git", "tag", "--list", f"v{version}"):
        raise ValueError(f"the tag v{version} exists already; choose a later version")
    path = root / "CHANGELOG.md"
    changelog = path.read_text()
    if not sections(changelog).get(UNRELEASED):
        raise ValueError(f"CHANGELOG.md has nothing under '## {UNRELEASED}' to release")
    path.write_text(
        changelog.replace(f"## {UNRELEASED}\n", f"## {UNRELEASED}\n\n## {version} ({today})\n", 1)
    )
    run("uv", "version", "--frozen", version)  # pyproject.toml
    run("uv", "lock")  # it names the version too
    run("git", "commit", "--all", "--message", f"Release {version}")
    run("git", "tag", "--annotate", f"v{version}", "--message", notes(root, version))


def main() -> None:
    try:
        match sys.argv[1:]:
            case ["notes"]:
                print(notes(ROOT, current(ROOT)))
            case ["notes", version]:
                print(notes(ROOT, version))
            case ["cut", version]:
                cut(ROOT, version, datetime.date.today())
                print(f"tagged v{version}; next: git push --follow-tags")
            case _:
                raise ValueError(str(__doc__).strip())
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
