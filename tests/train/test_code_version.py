"""What a run keeps of code that differs from its commit."""

import subprocess
from pathlib import Path

import pytest

from megagpt.train.code_version import diff_of


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "code.py").write_text("".join(f"line {i}\n" for i in range(50)))
    (folder / "staged.py").write_text("old\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_the_diff_rebuilds_the_code(checkout: Path, tmp_path: Path) -> None:
    assert diff_of(checkout) == ""
    (checkout / "code.py").write_text("".join(f"line {i * i}\n" for i in range(50)))
    (checkout / "staged.py").write_text("new\n")
    git(checkout, "add", "staged.py")
    (checkout / "key.txt").write_text("secret of an untracked file\n")
    git(checkout, "config", "diff.noprefix", "true")
    git(checkout, "config", "color.diff", "always")
    found = diff_of(checkout)
    assert "secret" not in found
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(checkout), str(other))
    (tmp_path / "found.diff").write_text(found)
    git(other, "apply", str(tmp_path / "found.diff"))
    for name in ("code.py", "staged.py"):
        assert (other / name).read_text() == (checkout / name).read_text()


def test_a_large_diff_is_cut_at_a_line(checkout: Path) -> None:
    (checkout / "code.py").write_text("".join(f"other text {i}\n" for i in range(100_000)))
    whole, found = diff_of(checkout, 10**8), diff_of(checkout, 1000)
    kept, _, last = found.rstrip("\n").rpartition("\n")
    assert last == "# cut here: the whole is larger than 1,000 bytes"
    assert 900 < len(kept) <= 1000
    assert whole.startswith(kept + "\n")


def test_outside_a_checkout_there_is_none(tmp_path: Path) -> None:
    assert diff_of(tmp_path / "nowhere") == ""
