"""Encode documents in memory with one library; prints CPU seconds, megabytes and a hash of the ids as JSON.

    python -m bench.data.encoders ENCODER DOCUMENTS_FOLDER GPT2_FOLDER TOKENIZER_JSON

ENCODER: fastokens and tiktoken (through megagpt's tokenizer), tiktoken_batch, tokenizers (the libraries' own batch calls).
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.documents import read_documents
from megagpt.tokenizer.open_tokenizer import open_tokenizer

BATCH = 256


def encoder(name: str, gpt2: Path, tokenizer_json: str) -> Callable[[list[str]], list[Any]]:
    """texts -> ids of each."""
    if name in ("fastokens", "tiktoken"):
        return open_tokenizer(gpt2, name).encode_batch  # type: ignore[arg-type, return-value]
    if name == "tokenizers":
        import tokenizers

        model = tokenizers.Tokenizer.from_file(tokenizer_json)
        return lambda texts: [encoding.ids for encoding in model.encode_batch(texts, add_special_tokens=False)]
    import tiktoken

    from megagpt.tokenizer.bpe import ranks_from_merges
    from megagpt.tokenizer.reading import GPT2_PATTERN

    ranks = ranks_from_merges(gpt2 / "encoder.json", gpt2 / "vocab.bpe").ranks
    model = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: model.encode_ordinary_batch(texts, num_threads=1)


def main(words: list[str]) -> None:
    """Print one JSON object."""
    name, folder, gpt2, tokenizer_json = words
    texts = [document.text for path in sorted(Path(folder).glob("*.jsonl.zst")) for document in read_documents(path)]
    # A vocabulary's end-of-text written out in a text is one special id to some libraries.
    texts = [text.replace("<|endoftext|>", "") for text in texts]
    encode = encoder(name, Path(gpt2), tokenizer_json)
    encode(["A first text, so that nothing is loaded later."])
    started = time.process_time()
    ids = [encode(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    seconds = time.process_time() - started
    digest = hashlib.md5()
    for batch in ids:
        for one in batch:
            digest.update(np.asarray(one, np.uint32).tobytes())
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(
        json.dumps(
            {"cpu_s": seconds, "mb": round(megabytes, 1), "mb_per_cpu_s": megabytes / seconds, "ids_md5": digest.hexdigest()}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
