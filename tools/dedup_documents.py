"""Drop exact copies and verified near duplicates; the earliest document stays (section `dedup` of a corpus config).

    python tools/dedup_documents.py configs/corpus/common_crawl.yaml work_dir=/data/crawl
    python tools/dedup_documents.py work_dir=/data/news dedup.inputs=[news/*.jsonl] dedup.threshold=0.7

A document is dropped only if it is that similar to a kept one; dedup/duplicates/ names the kept one and the similarity.
Memory is bounded by dedup.memory_bytes. A rerun resumes where the last one stopped; neither the number of workers nor
part=i/n changes a byte of the result.
"""

from megagpt.command import main
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.dedup.dedup_documents import dedup_documents, describe


def run(config: CorpusConfig) -> None:
    """Deduplicate, and say how many documents were copies."""
    output_dir = config.directory("dedup")
    summary = dedup_documents(config.dedup, config.inputs("dedup", config.dedup.inputs), output_dir, config)
    print(describe(summary, output_dir))


if __name__ == "__main__":
    main(CorpusConfig, run, __doc__ or "")
