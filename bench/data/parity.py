"""Do the quality rules give datatrove's verdicts, given datatrove's words and sentences?

    python -m bench.data.parity DATA_FOLDER [NUM_DOCUMENTS]

Texts: the gold texts and the pages of DATA_FOLDER/extract, news articles of DATA_FOLDER/dedup, and damaged variants of them
(repeated, cut, bulleted, shuffled lines) that reach rules which web text seldom breaks. Writes results/data_parity.json.
"""

import gzip
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.measure import peer_python, peer_versions, run_once
from megagpt.measurement import PROJECT, write_results

DATATROVE = (
    "datatrove[io,processing]==0.10.1", "spacy==3.8.18", "lxml_html_clean", "numba", "orjson", "pydantic>=2.12", "PyYAML",
    "xxhash", "zstandard",
)  # fmt: skip
"""datatrove's environment, with what the rules of this project import."""


def texts(data_folder: Path, count: int) -> list[str]:
    """`count` texts, always the same ones."""
    base = [text for text in _real_texts(data_folder) if text.strip()]
    rng, found = random.Random(0), list(base)
    while len(found) < count:
        found.append(_damaged(rng.choice(base), rng))
    return [text for text in found if text.strip()][:count]


def main(words: list[str]) -> None:
    """Write results/data_parity.json."""
    folder, count = Path(words[0]), int(words[1]) if len(words) > 1 else 2000
    python = peer_python("datatrove", DATATROVE)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "texts.json")
        path.write_text(json.dumps(texts(folder, count)), encoding="utf-8")
        command = [str(python), "-m", "bench.data.peers.datatrove", "parity", str(path)]
        run = run_once(command, environment={"PYTHONPATH": str(PROJECT)})
    print(json.dumps(run.output, indent=1))
    peers = peer_versions(python, ["datatrove", "spacy"])
    write_results("data_parity", run.output, packages=["megagpt"], peers=peers)


def _real_texts(folder: Path) -> Iterator[str]:
    from resiliparse.extract.html2text import extract_plain_text

    for path in sorted((folder / "extract/cleaneval-dev/gold").rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            yield (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")
    for line in (folder / "dedup/articles_1000.train").read_text(encoding="utf-8").splitlines():
        yield line.partition(" ")[2].replace(". ", ".\n")
    for path in sorted((folder / "extract").glob("*/html/*")) + sorted((folder / "extract/cleaneval-dev/input").glob("*")):
        data = path.read_bytes()
        page = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")
        yield extract_plain_text(page, main_content=True)
        yield extract_plain_text(page, main_content=False)


def _damaged(text: str, rng: random.Random) -> str:
    lines, kind = text.split("\n"), rng.random()
    if kind < 0.3:
        at = rng.randrange(len(lines))
        lines = lines[:at] + lines[at : at + 5] * rng.randint(1, 3) + lines[at:]
    elif kind < 0.5:
        lines = lines[: rng.randint(1, 6)]
    elif kind < 0.6:
        lines = [f"- {line}" for line in lines]
    elif kind < 0.7:
        lines = [f"{line}..." for line in lines]
    elif kind < 0.8:
        lines = [f"{word} #" for line in lines for word in line.split(".")]
    else:
        rng.shuffle(lines)
    return "\n".join(lines)[:20000]


if __name__ == "__main__":
    main(sys.argv[1:])
