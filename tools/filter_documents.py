"""Keep the documents that pass the filters, and clean their text (section `filter` of a corpus config).

    python tools/filter_documents.py configs/corpus/common_crawl.yaml work_dir=/data/crawl
    python tools/filter_documents.py work_dir=/data/news filter.inputs=[news/*.jsonl] filter.language.labels=[de,fr]

`filter.order` names the filters and their order; thresholds default to those of the papers, null switches a rule off. The
reason of every dropped document is kept (filter/dropped/), and for each reason a sample of what it dropped (filter/rejected/).
"""

from megagpt.command import main
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.filters.filter_documents import describe, filter_documents


def run(config: CorpusConfig) -> None:
    """Filter, and print what was dropped and why."""
    output_dir = config.directory("filter")
    summary = filter_documents(config.filter, config.inputs("filter", config.filter.inputs), output_dir, config)
    print(describe(summary, output_dir))


if __name__ == "__main__":
    main(CorpusConfig, run, __doc__ or "")
