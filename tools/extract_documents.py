"""Extract the text of dumps: WARC, ARC and WET files, Wikipedia XML, jsonl, Parquet, text, Hugging Face datasets.

    python tools/extract_documents.py configs/corpus/common_crawl.yaml work_dir=/data/cc extract.inputs='[/dumps/*.warc.gz]'

Writes documents to work_dir/extract/*.jsonl.zst, with counts in summary.json, what was dropped and why in dropped/, and samples
of it in rejected/. A rerun resumes where the last one stopped.
"""

from megagpt.command import main
from megagpt.config import UserError
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.extraction.extract_documents import extract_documents


def run(config: CorpusConfig) -> None:
    """Extract, and print where the result is."""
    if config.extract is None:
        raise UserError("extract: the configuration has no such section, which names the dumps (extract.inputs)")
    summary = extract_documents(config.extract, config.directory("extract"), config)
    malformed = sum(summary.faults.values())
    counts = f"{summary.kept:,} of {summary.documents_in:,} documents kept, {malformed:,} malformed records"
    print(f"{counts}: {config.directory('extract')}")


if __name__ == "__main__":
    main(CorpusConfig, run, __doc__ or "")
