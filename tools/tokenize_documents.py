"""Split a corpus into train and validation, tokenize, shuffle, and write shards (section `tokenize` of its config).

    python tools/tokenize_documents.py configs/corpus/common_crawl.yaml work_dir=/data/crawl
    python tools/tokenize_documents.py work_dir=/data/plays tokenize.inputs=[plays.jsonl] tokenize.tokenizer=bytes

The shards are Megatron's .bin and .idx, with a manifest, checksums and a table of their documents. A run that ended before goes
on; neither the number of workers nor part=i/n changes a byte of the result.
"""

from megagpt.command import main
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.packing.dataset_rows import with_datasets_as_files
from megagpt.corpus.packing.tokenize_documents import describe, pack_documents


def run(config: CorpusConfig) -> None:
    """Write the shards, and say what there is."""
    output_dir, tokenizer = config.directory("shards"), config.tokenize.tokenizer or config.directory("tokenizer")
    given = with_datasets_as_files(
        config.tokenize.inputs, config.work_dir / "rows", config.tokenize.supervised, overwrite=config.overwrite
    )
    summary = pack_documents(config.inputs("shards", given), output_dir, tokenizer, config.tokenize, config)
    print(describe(summary, output_dir))


if __name__ == "__main__":
    main(CorpusConfig, run, __doc__ or "")
