"""Train a SentencePiece tokenizer on a sample of a corpus's documents (section `tokenizer` of its config).

    python tools/train_tokenizer.py configs/corpus/common_crawl.yaml work_dir=/data/crawl tokenizer.vocab_size=32000

It is lossless: decoding gives back every text exactly. A rerun resumes; the same documents give the same file.
"""

from megagpt.command import main
from megagpt.config import UserError
from megagpt.corpus.config import CorpusConfig
from megagpt.tokenizer.train_tokenizer import describe, train_tokenizer


def run(config: CorpusConfig) -> None:
    """Train it, and print its path."""
    if config.part != "0/1":
        raise UserError(f"part={config.part}: a tokenizer is trained in one piece: run this once, without part")
    output_dir = config.directory("tokenizer")
    summary = train_tokenizer(config.inputs("tokenizer", config.tokenizer.inputs), output_dir, config.tokenizer)
    print(describe(summary, output_dir))


if __name__ == "__main__":
    main(CorpusConfig, run, __doc__ or "")
