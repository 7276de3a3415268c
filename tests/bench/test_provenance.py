import shutil
import subprocess

import pytest

from dcngen.bench import operator


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_that_of_the_code_and_says_when_files_differ(tmp_path, monkeypatch):
    file = tmp_path / "operator.py"
    file.write_text("")
    monkeypatch.setattr(operator, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))  # whatever lies above is not asked
    assert operator.source_commit() is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        run = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    git("init", "-q")
    git("add", "operator.py")
    git("commit", "-qm", "first")
    assert operator.source_commit() == git("rev-parse", "--short", "HEAD")
    file.write_text("changed")
    assert operator.source_commit().endswith("-dirty")


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert operator.source_commit() is None
