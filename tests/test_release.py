"""`just release` and `just release-notes`, in a repository of the test's."""

import datetime
import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "release.py"
DAY = datetime.date(2026, 12, 24)


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project at 0.1.0 with something unreleased, all committed."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "someone@example.org")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "toy"\nversion = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- It flies.\n")
    said(tmp_path, "git", "init", "-q")
    said(tmp_path, "git", "add", "--all")
    said(tmp_path, "git", "commit", "-qm", "Begin")
    return tmp_path


def said(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def test_a_release_sets_the_version_dates_the_changes_and_tags_them(release: ModuleType, git: Path) -> None:
    assert release.notes(git, "0.1.0") == "- It flies."
    release.cut(git, "0.2.0", DAY)
    assert release.current(git) == "0.2.0"
    assert "## Unreleased\n\n## 0.2.0 (2026-12-24)\n\n- It flies." in (git / "CHANGELOG.md").read_text()
    assert release.notes(git, "0.2.0") == "- It flies."
    assert said(git, "git", "log", "--format=%s %D", "-1").startswith("Release 0.2.0 HEAD")
    assert "- It flies." in said(git, "git", "tag", "--list", "-n9", "v0.2.0")
    with pytest.raises(ValueError, match=r"no section with text for 0\.1\.0"):
        release.notes(git, "0.1.0")


def test_a_release_that_makes_no_sense_is_refused_and_changes_nothing(release: ModuleType, git: Path) -> None:
    with pytest.raises(ValueError, match=r"write it like 0\.2\.0"):
        release.cut(git, "v2", DAY)
    (git / "new").touch()
    with pytest.raises(ValueError, match="uncommitted changes"):
        release.cut(git, "0.2.0", DAY)
    (git / "new").unlink()
    (git / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n")
    said(git, "git", "commit", "-qam", "Forget")
    with pytest.raises(ValueError, match="nothing under '## Unreleased'"):
        release.cut(git, "0.2.0", DAY)
    assert release.current(git) == "0.1.0" and not said(git, "git", "tag")
