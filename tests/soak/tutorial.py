"""Runs docs/tutorial.md as printed, in the project's folder, and compares each output with the page.

    python tests/soak/tutorial.py

A block `sh` is run; the block `text` below it is what must come out: its lines in this order, others may stand between
them, figures may differ, and `...` stands for anything.
"""

import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PAGE = PROJECT / "docs" / "tutorial.md"
NUMBER = re.compile(r"\d[\d,.]*(?:e[-+]\d+)?")


def blocks(page: str) -> list[tuple[str, list[str]]]:
    """(commands, expected lines) of each block `sh` with the block `text` that follows it."""
    found = re.findall(r"^```sh\n(.*?)^```\n\n```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [(commands, expected.splitlines()) for commands, expected in found]


def line_pattern(line: str) -> re.Pattern[str]:
    """What an expected line matches: the same words, any figures, anything for `...`."""
    pieces = [NUMBER.sub("0", piece) for piece in line.split("...")]
    return re.compile(".*".join(r"\d[\d,.]*(?:e[-+]\d+)?".join(map(re.escape, piece.split("0"))) for piece in pieces))


def missing_line(expected: list[str], output: str) -> str | None:
    """The first expected line that does not come after the one before it, None if all are there."""
    lines = iter(output.splitlines())
    for line in expected:
        if line.strip() == "...":
            continue
        pattern = line_pattern(line)
        if not any(pattern.search(given) for given in lines):
            return line
    return None


def run_page(page: str, environment: dict[str, str] | None = None) -> list[str]:
    """Run every block; the first block that fails or prints something else, none if all is as printed."""
    for commands, expected in blocks(page):
        done = subprocess.run(
            ["bash", "-e", "-c", commands],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        print(f"$ {commands}{done.stdout}", flush=True)
        line = missing_line(expected, done.stdout)
        if done.returncode or line is not None:
            return [f"{commands}status {done.returncode}; not in the output: {line!r}\n{done.stdout}"]
    return []


if __name__ == "__main__":
    problems = run_page(PAGE.read_text(encoding="utf-8"))
    print("\n".join(problems) or "all outputs are as printed")
    sys.exit(bool(problems))
