"""A Python with packages that exclude those of the project."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def own_python(folder: Path, requirements: Sequence[str]) -> Path:
    """The Python of a new environment at `folder`, with packages from the package index."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder.absolute() / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    return python
