"""Which code runs: the commit of its checkout, and what differs from it."""

import subprocess
import threading
from pathlib import Path

from megagpt.shipped import IN_CHECKOUT, ROOT

MAX_DIFF_BYTES = 256 << 10


def git_commit() -> str | None:
    """The commit of the code that runs, with `+changes` if the working tree differs from it; None outside a checkout."""
    if not IN_CHECKOUT:  # a repository that holds the environment is not ours
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def git_diff() -> str:
    """What `git_commit` calls changes; "" if there are none, or outside a checkout. See diff_of."""
    return diff_of(ROOT) if IN_CHECKOUT else ""


def diff_of(checkout: Path, max_bytes: int = MAX_DIFF_BYTES) -> str:
    """Staged and unstaged changes of the tracked files, as text that `git apply` takes.

    Files that git does not track, such as those with keys, are not in it, and of binary files only the names. Of more than
    `max_bytes` it is the beginning, to the end of a line, and a last line that says so. "" where git fails.
    """
    options = ["--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/"]
    command = ["git", "-C", str(checkout), "--no-optional-locks", "diff", *options, "HEAD"]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            timer = threading.Timer(20, process.kill)
            timer.start()
            data = process.stdout.read(max_bytes + 1)
            if len(data) > max_bytes:
                process.kill()
            status = process.wait()
            timer.cancel()
            if len(data) <= max_bytes and status != 0:
                return ""
    except (OSError, subprocess.SubprocessError):
        return ""
    if len(data) <= max_bytes:
        return data.decode(errors="replace")
    kept = data[: data[:max_bytes].rfind(b"\n") + 1].decode(errors="replace")
    return f"{kept}# cut here: the whole is larger than {max_bytes:,} bytes\n"
