"""Train a tokenizer on a sample of documents, drawn evenly from the input files. The same inputs give the same sample."""

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megagpt.config import UserError
from megagpt.documents import Document, read_documents
from megagpt.files import read_json, remove_leftovers, sha256_file, write_json
from megagpt.settings_record import MadeWith, fingerprint
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.config import TokenizerConfig
from megagpt.tokenizer.sentencepiece import train_sentencepiece

FORMAT = 1
"""Version of the stage: it grows when the same settings give a different tokenizer or other files."""


log = logging.getLogger(__name__)


HELD_OUT = 50
"""Every 50th document of the sample is held out from training; bytes per token are measured on these."""


@dataclass(frozen=True, slots=True)
class TokenizerSummary:
    """A trained tokenizer, and how well it compresses held-out text."""

    vocab_size: int
    sha256: str
    documents: int
    characters: int
    bytes_per_token: float
    inputs: dict[str, int]
    """File -> documents in the sample."""
    config_sha256: str
    sample_sha256: str
    format: int = 1
    settings: dict[str, Any] | None = None
    """The settings of config_sha256; None = an earlier release, which did not keep them, made the tokenizer."""


def train_tokenizer(inputs: Sequence[Path], output_dir: Path, config: TokenizerConfig) -> TokenizerSummary:
    """Train output_dir/tokenizer.model and write summary.json beside it; a tokenizer of the same sample and settings is kept.

    Raises UserError if the inputs hold no text or vocab_size does not suit them.
    """
    remove_leftovers([output_dir])
    documents, files = [], {}
    for path, budget in file_budgets(inputs, config).items():
        sample = sample_documents(path, budget)
        files[path.name] = len(sample)
        documents += sample
        log.info("%s: %d documents sampled", path.name, len(sample))
    if not documents:
        raise UserError(f"{inputs[0] if inputs else output_dir}: no text to train a tokenizer on")
    digest = xxhash.xxh3_128()
    for document in documents:
        digest.update(f"{document.id}\x00{document.text}\x00".encode())
    settings = config.model_copy(update={"inputs": ()})
    made_with = MadeWith(fingerprint(settings), "tokenizer", settings, format=FORMAT)
    path = output_dir / "summary.json"
    if path.is_file() and (output_dir / "tokenizer.model").is_file():
        found = TokenizerSummary(**read_json(path))
        same = (found.config_sha256, found.sample_sha256) == (made_with.config_hash, digest.hexdigest())
        if same and found.sha256 == sha256_file(output_dir / "tokenizer.model"):
            log.info("%s: complete", output_dir)
            return found
        log.info("%s: the tokenizer was made with %s: it is trained again", output_dir, made_with.other(asdict(found)))
    path.unlink(missing_ok=True)
    tokenizer = train_sentencepiece(
        (document.text for i, document in enumerate(documents) if i % HELD_OUT or len(documents) < HELD_OUT),
        output_dir,
        vocab_size=config.vocab_size,
        model_type=config.model_type,
        split_digits=config.split_digits,
        character_coverage=config.character_coverage,
    )
    held_out = [document.text for document in documents[::HELD_OUT]]
    summary = TokenizerSummary(
        vocab_size=tokenizer.vocab_size,
        sha256=sha256_file(output_dir / "tokenizer.model"),
        documents=len(documents),
        characters=sum(len(document.text) for document in documents),
        bytes_per_token=round(bytes_per_token(tokenizer, held_out), 4),
        inputs=files,
        config_sha256=made_with.config_hash,
        sample_sha256=digest.hexdigest(),
        format=FORMAT,
        settings=settings.model_dump(mode="json"),
    )
    write_json(path, asdict(summary))
    return summary


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Mean UTF-8 bytes per token."""
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)


def file_budgets(inputs: Sequence[Path], config: TokenizerConfig) -> dict[Path, int]:
    """Characters to draw from each file: equal shares; the part that a small file cannot give goes to the others.

    A file's size decides what it can give (up to five characters per byte of compressed text), so nothing is read.
    """
    step = max(1, -(-len(inputs) // config.max_files))
    files = sorted(sorted(inputs)[::step], key=lambda path: (path.stat().st_size, path))
    budgets, left = {}, config.max_characters
    for number, path in enumerate(files):
        share = left // (len(files) - number)
        compressed = path.suffix in (".zst", ".gz")
        budgets[path] = share
        left -= min(share, path.stat().st_size * (5 if compressed else 1))
    return dict(sorted(budgets.items()))


def sample_documents(path: Path, max_characters: int) -> list[Document]:
    """The documents of a file whose ids have the smallest hashes, up to a number of characters, in file order.

    A document longer than the budget is cut. The budget bounds the memory.
    """
    chosen: list[tuple[int, int, Document]] = []
    characters = 0
    for number, document in enumerate(_texts(path, max_characters)):
        # The top of the heap has the largest hash, so documents beyond the budget leave in this order.
        heapq.heappush(chosen, (-xxhash.xxh3_64_intdigest(document.id.encode()), number, document))
        characters += len(document.text)
        while characters > max_characters and len(chosen) > 1:
            characters -= len(heapq.heappop(chosen)[2].text)
    return [document for _, _, document in sorted(chosen, key=lambda item: item[1])]


def _texts(path: Path, max_characters: int) -> Iterator[Document]:
    for document in read_documents(path):
        if document.text:
            yield Document(document.id, document.text[:max_characters], document.source)


def describe(summary: TokenizerSummary, output_dir: Path) -> str:
    """The line that the tool prints at the end."""
    return (
        f"{output_dir / 'tokenizer.model'}: {summary.vocab_size:,} ids, {summary.bytes_per_token:.2f} bytes per token, "
        f"from {summary.documents:,} documents with {summary.characters:,} characters"
    )
