"""datatrove's side of bench/data/stages.py and bench/data/parity.py; runs in datatrove's own environment.

    python -m bench.data.peers.datatrove STAGE INPUT_FOLDER OUTPUT_FOLDER TASKS LANGUAGE_MODEL TOKENIZER_JSON
    python -m bench.data.peers.datatrove extraction PAGES_JSON TEXTS_JSON
    python -m bench.data.peers.datatrove parity TEXTS_JSON

Settings are those of datatrove's examples/fineweb.py, with one process. Its language filter downloads a model; here it gets the
small one by path, the same that ours uses. `start` imports and ends: what every stage spends before its work.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("start", "extract", "filter", "front", "dedup", "tokenize", "all")


def extraction(folder: str) -> list[Any]:
    """WARC files to text."""
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.readers import WarcReader

    return [WarcReader(folder, glob_pattern="*.warc.gz"), Trafilatura(favour_precision=True, timeout=60)]


def filters() -> list[Any]:
    """FineWeb's filters without those on URLs and personal data."""
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LanguageFilter,
    )

    return [
        LanguageFilter("en"),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]


def run(pipeline: list[Any], tasks: int) -> None:
    """Run a pipeline in this process, task after task."""
    from datatrove.executor import LocalPipelineExecutor

    # By default its logs lie in the working directory; in one folder for all it would take a second pipeline for done.
    LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=tempfile.mkdtemp(prefix="datatrove_")).run()


def extract(source: str, target: str, tasks: int) -> None:
    from datatrove.pipeline.writers import JsonlWriter

    run([*extraction(source), JsonlWriter(target)], tasks)


def filter_documents(source: str, target: str, tasks: int) -> None:
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    run([JsonlReader(source, glob_pattern="*.jsonl.zst"), *filters(), JsonlWriter(target)], tasks)


def front(source: str, target: str, tasks: int) -> None:
    """Extraction and filters in one pipeline, as the example has it."""
    from datatrove.pipeline.writers import JsonlWriter

    run([*extraction(source), *filters(), JsonlWriter(target)], tasks)


def dedup(source: str, target: str, tasks: int) -> None:
    """Near-duplicate removal in its four steps: 14 bands of 8 rows, 5-grams of words."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=14, hashes_per_bucket=8, n_grams=5)
    base = f"{target}/minhash"
    reader = JsonlReader(source, glob_pattern="*.jsonl*")
    run([reader, MinhashDedupSignature(output_folder=f"{base}/signatures", config=config)], tasks)
    run([MinhashDedupBuckets(f"{base}/signatures", f"{base}/buckets", config=config)], config.num_buckets)
    run([MinhashDedupCluster(f"{base}/buckets", f"{base}/remove", config=config)], 1)
    run([reader, MinhashDedupFilter(input_folder=f"{base}/remove"), JsonlWriter(f"{target}/kept")], tasks)


def tokenize(source: str, target: str, tasks: int, tokenizer: str) -> None:
    """Tokenize, shuffle and merge."""
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger

    reader = JsonlReader(source, glob_pattern="*.jsonl*")
    tokenizer_step = DocumentTokenizer(f"{target}/tokens", tokenizer, eos_token="<|endoftext|>", seed=1)
    run([reader, tokenizer_step], tasks)
    run([DocumentTokenizerMerger(f"{target}/tokens", f"{target}/merged", save_filename="corpus", seed=1, progress=False)], 1)


def start(*_: Any) -> None:
    """Import what the stages import."""
    extraction(".")
    filters()


def main(words: list[str]) -> None:
    """Run one stage and print counts as JSON."""
    if words[0] == "parity":
        print(json.dumps(parity([str(text) for text in json.loads(Path(words[1]).read_text(encoding="utf-8"))])))
        return
    if words[0] == "extraction":
        print(json.dumps(extract_pages(Path(words[1]), Path(words[2]))))
        return
    stage, source, target, tasks, language_model, tokenizer = words
    _use_language_model(language_model)
    steps: dict[str, Callable[..., None]] = {
        "start": start, "extract": extract, "filter": filter_documents, "front": front, "dedup": dedup,
    }  # fmt: skip
    if stage == "all":
        front(source, f"{target}/front", int(tasks))
        dedup(f"{target}/front", f"{target}/dedup", int(tasks))
        tokenize(f"{target}/dedup/kept", f"{target}/shards", int(tasks), tokenizer)
    elif stage == "tokenize":
        tokenize(source, target, int(tasks), tokenizer)
    else:
        steps[stage](source, target, int(tasks))


def extract_pages(pages_file: Path, texts_file: Path) -> dict[str, float]:
    """The texts of HTML pages by the extractor with its sandbox; CPU seconds of both processes, without its first start."""
    import os
    import time

    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.extractors.base import ExtractorSandbox

    pages, extractor, texts = json.loads(pages_file.read_text(encoding="utf-8")), Trafilatura(timeout=60), []
    with ExtractorSandbox(timeout=60) as sandbox:
        sandbox.process_document(pages[0], extractor.extract)
        child = Path(f"/proc/{sandbox.process.pid}/stat")

        def cpu_seconds() -> float:
            used = child.read_text().rpartition(")")[2].split()
            return time.process_time() + (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")

        started = cpu_seconds()
        for page in pages:
            texts.append(sandbox.process_document(page, extractor.extract) or "")
        seconds = cpu_seconds() - started
    texts_file.write_text(json.dumps(texts), encoding="utf-8")
    return {"cpu_s": seconds, "pages": len(pages)}


def _use_language_model(path: str) -> None:
    from datatrove.utils import lid

    lid.cached_asset_path_or_download = lambda *args, **kwargs: path


# ---- the same rules on the same words


_REASONS: dict[str, dict[str, str]] = {
    "gopher_repetition": {
        "dup_para_frac": "duplicate_paragraphs", "dup_para_char_frac": "duplicate_paragraph_chars",
        "dup_line_frac": "duplicate_lines", "dup_line_char_frac": "duplicate_line_chars", "empty": "empty",
        **{f"top_{n}_gram": f"top_{n}_gram" for n in (2, 3, 4)},
        **{f"duplicated_{n}_n_grams": f"duplicate_{n}_grams" for n in range(5, 11)},
    },
    "gopher_quality": {
        "gopher_short_doc": "too_few_words", "gopher_long_doc": "too_many_words",
        "gopher_below_avg_threshold": "words_too_short", "gopher_above_avg_threshold": "words_too_long",
        "gopher_too_many_hashes": "too_many_hashes", "gopher_too_many_ellipsis": "too_many_ellipses",
        "gopher_too_many_bullets": "too_many_bullet_lines", "gopher_too_many_end_ellipsis": "too_many_ellipsis_lines",
        "gopher_below_alpha_threshold": "too_few_alphabetic_words", "gopher_enough_stop_words": "too_few_stop_words",
    },
    "c4": {name: name for name in ("lorem_ipsum", "curly_bracket", "too_few_sentences")},
    "fineweb": {
        "empty": "empty", "line_punct_ratio": "few_punctuated_lines", "short_line_ratio": "short_lines",
        "char_dup_ratio": "duplicate_line_chars", "list_ratio": "list_like",
    },
}  # fmt: skip
"""datatrove's reasons and ours."""


def parity(texts: list[str]) -> dict[str, Any]:
    """Verdict, reason and text of datatrove's Gopher, C4 and FineWeb filters and of ours, chained and each alone.

    Ours get datatrove's word and sentence lists, then their own splitter.
    """
    from datatrove.pipeline.filters import C4QualityFilter
    from datatrove.utils.text import split_into_sentences, split_into_words

    from megagpt.corpus.filters.registry import FilterConfig, build_filters
    from megagpt.corpus.text.words import DEFAULT_SPLITTER, Splitter

    names = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
    theirs = dict(zip(names, filters()[1:], strict=True))
    as_fineweb = FilterConfig.model_validate({"order": names, "c4": {"keep_only_terminal_punctuation": False}})
    as_paper = FilterConfig.model_validate({"order": ["c4"]})
    same = Splitter(split_into_words, split_into_sentences)
    ours, own = (dict(zip(names, build_filters(as_fineweb, splitter=s), strict=True)) for s in (same, DEFAULT_SPLITTER))
    paper_ours, paper_theirs = build_filters(as_paper, splitter=same)[0], C4QualityFilter()
    reasons: Counter[str] = Counter()
    found = Counter(documents=len(texts))
    for text in texts:
        expected = _chain_theirs(text, theirs)
        reasons[expected[0] or "kept"] += 1
        found["chain_same_verdict_reason_and_text"] += _chain_ours(text, ours) == expected
        found["own_splitter_same_keep_or_drop"] += (_chain_ours(text, own)[0] is None) == (expected[0] is None)
        for name in names:
            found["single_rules"] += 1
            found["single_rules_same"] += _chain_ours(text, {name: ours[name]}) == _chain_theirs(text, {name: theirs[name]})
        found["single_rules"] += 1
        found["single_rules_same"] += _chain_ours(text, {"c4": paper_ours}) == _chain_theirs(text, {"c4": paper_theirs})
    return {**found, "reasons": dict(reasons.most_common())}


def _chain_theirs(text: str, chain: dict[str, Any]) -> tuple[str | None, str]:
    from datatrove.data import Document

    document = Document(text=text, id="")
    for name, step in chain.items():
        result = step.filter(document)
        if result is not True:
            return f"{name}:{_REASONS[name][result[1]]}", ""
    return None, document.text


def _chain_ours(text: str, chain: dict[str, Any]) -> tuple[str | None, str]:
    from megagpt.corpus.filters.registry import apply_filters
    from megagpt.documents import Document, Rejected

    outcome = apply_filters(Document("", text, ""), list(chain.values()))
    return (outcome.reason, "") if isinstance(outcome, Rejected) else (None, outcome.text)


if __name__ == "__main__":
    main(sys.argv[1:])
