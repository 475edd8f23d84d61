"""A disk that fills up when a test wants it to."""

import subprocess
from pathlib import Path


class SmallDisk:
    """A disk in memory, mounted at `path`, that is full when a test wants it to be."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, kib: int) -> None:
        """Give it so many KiB; what is on it stays."""
        subprocess.run(["mount", "-o", f"remount,size={kib}k", self.path], check=True)
