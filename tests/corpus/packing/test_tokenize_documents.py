"""Packing: every document once, in the order of keys; the same bytes for any workers, parts, blocks and kills."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from small_disk import SmallDisk

from megagpt.config import UserError
from megagpt.corpus.packing import best_fit, segments
from megagpt.corpus.packing import overlap as leaks
from megagpt.corpus.packing import tokenize_documents as pack
from megagpt.corpus.packing.best_fit import best_fit_order, num_cut
from megagpt.corpus.packing.config import TokenizeConfig
from megagpt.corpus.packing.tokenize_documents import pack_documents
from megagpt.corpus.runner import blocks
from megagpt.corpus.runner.config import Execution
from megagpt.data.shards import ShardWriter, open_shard, read_manifest, verify_shard
from megagpt.documents import Document, read_documents, write_documents
from megagpt.settings_record import MadeWith
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.config import TokenizerConfig
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.sentencepiece import train_sentencepiece
from megagpt.tokenizer.special_ids import write_special_ids
from megagpt.tokenizer.train_tokenizer import file_budgets, sample_documents, train_tokenizer

WORDS = [
    "the",
    "of",
    "and",
    "in",
    "to",
    "a",
    "is",
    "was",
    "it",
    "for",
    "as",
    "with",
    "his",
    "on",
    "had",
    "but",
    "which",
    "naïve",
    "日本",
]


def make_corpus(folder: Path, files: int = 3, documents: int = 120) -> list[Path]:
    rng = np.random.default_rng(1)
    paths = []
    for number in range(files):
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 60))) + ".\n" for _ in range(documents)]
        path = folder / f"part{number}.jsonl.zst"
        items = [
            Document(f"part{number}:{i}", text, "news" if i % 3 else "books", f"http://x/{number}/{i}" if i % 2 else None)
            for i, text in enumerate(texts)
        ]
        write_documents(path, items)
        paths.append(path)
    return paths


def run(inputs: list[Path], output: Path, tokenizer: str = "bytes", workers: int = 0, part: str = "0/1", **values: Any):
    """Pack with a pool of workers, or in this process (workers=0), which spares the seconds a pool takes to start."""
    overwrite = values.pop("overwrite", False)
    config = TokenizeConfig(**{"validation_fraction": 0.1, "overlap_threshold": None, **values})
    executor = "process" if workers else "inline"
    execution = Execution(executor=executor, num_workers=max(workers, 1), part=part, overwrite=overwrite)
    return pack_documents(inputs, output, tokenizer, config, execution)


def read_split(directory: Path, tokenizer: Tokenizer) -> list[dict]:
    """Documents of a split in shard order, read back from tokens and rows."""
    manifest = read_manifest(directory)
    documents = []
    for info in manifest.shards:
        assert list(verify_shard(directory, info, manifest.dtype)) == []
        shard = open_shard(directory, info, manifest.dtype)
        rows = pq.read_table(directory / f"{info.name}.docs.parquet").to_pylist()
        offsets = shard.document_offsets()
        assert len(rows) == len(offsets) - 1 == info.documents
        for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
            tokens = shard.read(int(start), int(end - start))
            assert tokens[-1] == tokenizer.eot_id
            assert row["tokens"] == len(tokens)
            text = tokenizer.decode(tokens[tokenizer.bos_id is not None : -1].tolist())
            assert row["bytes"] == len(text.encode())
            documents.append({**row, "text": text})
        assert info.text_bytes == sum(row["bytes"] for row in rows)
    return documents


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def packed(corpus: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in shards of 4,000 tokens, made in this process without interruption."""
    output = tmp_path_factory.mktemp("packed") / "shards"
    run(corpus, output, shard_tokens=4000)
    return output


def test_documents_begin_with_the_tokenizers_begin_of_text_id(corpus: list[Path], tmp_path: Path) -> None:
    """The same documents, each with one token more in front; text and its bytes are what they were."""
    texts = (document.text for path in corpus for document in read_documents(path))
    plain = train_sentencepiece(texts, tmp_path / "plain", vocab_size=300)
    plain.save(tmp_path / "begun")
    write_special_ids(tmp_path / "begun", eos_ids=[plain.eot_id], bos_id=0)
    begun = open_tokenizer(tmp_path / "begun")
    for name in ("plain", "begun"):
        run(corpus, tmp_path / "shards" / name, str(tmp_path / name))
    for split in ("train", "validation"):
        expected = read_split(tmp_path / "shards" / "plain" / split, plain)
        folder = tmp_path / "shards" / "begun" / split
        found = read_split(folder, begun)
        assert [(row["id"], row["bytes"], row["tokens"]) for row in found] == [
            (row["id"], row["bytes"], row["tokens"] + 1) for row in expected
        ]
        manifest = read_manifest(folder)
        shard = open_shard(folder, manifest.shards[0], manifest.dtype)
        assert {int(shard.read(int(start), 1)[0]) for start in shard.document_offsets()[:-1]} == {0}


def test_every_document_once_in_the_order_of_its_key(corpus: list[Path], packed: Path) -> None:
    tokenizer = open_tokenizer(packed / "tokenizer")
    expected = {document.id: document for path in corpus for document in read_documents(path)}
    found = {split: read_split(packed / split, tokenizer) for split in ("train", "validation")}
    both = [*found["train"], *found["validation"]]
    assert {row["id"]: (row["text"], row["source"], row["url"]) for row in both} == {
        document.id: (document.text, document.source, document.url) for document in expected.values()
    }
    assert len(both) == len(expected) == 360
    bound = int(0.1 * 2**64)
    for split, rows in found.items():
        keys = [xxhash.xxh3_64_intdigest(row["id"].encode(), seed=0) for row in rows]
        assert keys == sorted(keys)
        chosen = {xxhash.xxh3_64_intdigest(row["id"].encode(), seed=segments.SPLIT_SEED) < bound for row in rows}
        assert chosen == {split == "validation"}
    manifest = read_manifest(packed / "train")
    assert len(manifest.shards) == -(-manifest.tokens // 4000) > 5
    assert manifest.tokenizer_sha256 == tokenizer.fingerprint
    assert not (packed / ".segments").exists()


def test_another_seed_is_another_order_and_the_same_split(corpus: list[Path], packed: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "s", shard_tokens=4000, seed=1)
    tokenizer = open_tokenizer("bytes")
    first, second = ([row["id"] for row in read_split(p / "validation", tokenizer)] for p in (packed, tmp_path / "s"))
    assert first != second
    assert sorted(first) == sorted(second)


def test_small_segments_leave_no_trace(
    corpus: list[Path], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many segments per block, and small batches.
    monkeypatch.setattr(segments, "SEGMENT_TOKENS", 900)
    monkeypatch.setattr(blocks, "BATCH_CHARACTERS", 50)
    run(corpus, tmp_path / "s", shard_tokens=4000)
    assert tree(tmp_path / "s") == tree(packed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_do_not_change_a_byte(corpus: list[Path], packed: Path, tmp_path: Path, workers: int) -> None:
    run(corpus, tmp_path / "s", workers=workers, shard_tokens=4000)
    assert tree(tmp_path / "s") == tree(packed)


def test_parts_do_not_change_a_byte(corpus: list[Path], packed: Path, tmp_path: Path) -> None:
    first = run(corpus, tmp_path / "s", part="1/2", shard_tokens=4000)
    assert not first.complete
    assert not (tmp_path / "s" / "train").exists()
    assert run(corpus, tmp_path / "s", part="0/2", shard_tokens=4000).complete
    assert run(corpus, tmp_path / "s", part="1/2", shard_tokens=4000).complete
    assert tree(tmp_path / "s") == tree(packed)


@pytest.mark.slow
def test_killed_anywhere_and_run_again(corpus: list[Path], packed: Path, tmp_path: Path) -> None:
    words = [f"tokenize.inputs={[str(path) for path in corpus]}", "tokenize.tokenizer=bytes", "tokenize.shard_tokens=4000"]
    words += ["tokenize.validation_fraction=0.1", "tokenize.overlap_threshold=null", "num_workers=1"]
    tool = Path(__file__).parents[3] / "tools" / "tokenize_documents.py"
    command = [sys.executable, str(tool), *words, f"work_dir={tmp_path}"]
    began = time.monotonic()
    subprocess.run([*command, f"work_dir={tmp_path / 'timed'}"], check=True, capture_output=True, timeout=900)
    delays = np.random.default_rng(3).uniform(0.1, 0.9, 8) * (time.monotonic() - began)
    kills = 0
    for delay in delays:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            # No reader may take what is there for a whole split unless it is one.
            for manifest in (tmp_path / "shards").glob("*/manifest.json"):
                read_manifest(manifest.parent)
        time.sleep(0.05)
    assert kills > 0
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    assert tree(tmp_path / "shards") == tree(packed)


def test_a_start_that_was_left_over_commits_no_shard(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it writes its first shard another start claims the folder for shards of other settings."""
    output, write = tmp_path / "shards", ShardWriter.add_many

    def add_many(writer: ShardWriter, *arguments: Any) -> None:
        pack._take_ownership(output, MadeWith("of other settings"), overwrite=True)
        write(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "add_many", add_many)
    with pytest.raises(UserError, match="a later start makes something else here"):
        run(corpus, output, shard_tokens=4000)
    assert not [path for path in output.rglob("*") if path.name.startswith(("shard_", "manifest.json", "summary.json"))]


def test_segments_of_a_left_over_worker_are_not_used(
    corpus: list[Path], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It commits a block, with another seed and split, before the later start has done it."""
    tokenize, jobs = segments._tokenize_block, []

    def stop(block: Any, job: segments.Job, cuts: segments.Cuts) -> int:
        jobs.append(job)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(segments, "_tokenize_block", stop)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "s", shard_tokens=4000, seed=7, validation_fraction=0.3)

    def after_left_over(block: Any, job: segments.Job, cuts: segments.Cuts) -> int:
        for late in blocks.document_blocks(corpus):
            tokenize(late, jobs[0], cuts)
        return tokenize(block, job, cuts)

    monkeypatch.setattr(segments, "_tokenize_block", after_left_over)
    run(corpus, tmp_path / "s", shard_tokens=4000, overwrite=True)
    assert tree(tmp_path / "s") == tree(packed)


def test_split_by_tail_cuts_each_source_by_characters(corpus: list[Path], tmp_path: Path) -> None:
    run(corpus, tmp_path / "s", split_by="tail", validation_fraction=0.25, separate_sources=True)
    tokenizer = open_tokenizer("bytes")
    for source in ("news", "books"):
        documents = [d for path in corpus for d in read_documents(path) if d.source == source]
        order = {document.id: number for number, document in enumerate(documents)}
        whole = "".join(document.text for document in documents)
        cut = int(len(whole) * 0.75)
        for split, expected in (("train", whole[:cut]), ("validation", whole[cut:])):
            rows = sorted(read_split(tmp_path / "s" / source / split, tokenizer), key=lambda row: order[row["id"]])
            assert "".join(row["text"] for row in rows) == expected


@pytest.mark.realdata
def test_shakespeare_is_split_as_nanogpt_does(shared_data: Path, tmp_path: Path) -> None:
    text = (shared_data / "lm/tinyshakespeare/input.txt").read_text()
    write_documents(tmp_path / "s.jsonl.zst", [Document("s:0", text, "shakespeare")])
    run([tmp_path / "s.jsonl.zst"], tmp_path / "s", split_by="tail", validation_fraction=0.1)
    tokenizer = open_tokenizer("bytes")
    (train,), (validation,) = (read_split(tmp_path / "s" / split, tokenizer) for split in ("train", "validation"))
    assert (len(train["text"]), len(validation["text"])) == (1_003_854, 111_540)
    assert train["text"] + validation["text"] == text


def test_a_finished_output_is_kept_and_another_one_refused(corpus: list[Path], tmp_path: Path) -> None:
    summary = run(corpus[:1], tmp_path / "s")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.bin")}
    assert run(corpus[:1], tmp_path / "s") == summary
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*.bin")} == times
    changes = ((corpus[:2], 0, "other inputs"), (corpus[:1], 5, r"other settings \(tokenize.seed: 0 -> 5\)"))
    for inputs, seed, what in changes:
        with pytest.raises(UserError, match=f"holds shards made with {what}"):
            run(inputs, tmp_path / "s", seed=seed)
    again = run(corpus[:2], tmp_path / "s", overwrite=True)
    run(corpus[:2], tmp_path / "fresh")
    assert again.complete
    assert tree(tmp_path / "s") == tree(tmp_path / "fresh")


def test_inputs_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "x.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        write_documents(path, [Document(f"{path.parent.name}:0", "text", "s")])
    with pytest.raises(UserError, match="have the same file name"):
        run(paths, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_empty_documents_are_counted_and_sources_need_names(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl.zst", [Document("a:0", "", "x/y"), Document("a:1", "text", "x y")])
    for split_by in ("hash", "tail"):
        summary = run([tmp_path / "a.jsonl.zst"], tmp_path / split_by, split_by=split_by, validation_fraction=0)
        assert summary.empty_documents == 1
        assert summary.splits["train"] == {"shards": 1, "documents": 1, "tokens": 5, "bytes": 4}
        assert summary.splits["validation"] == {"shards": 0, "documents": 0, "tokens": 0, "bytes": 0}
    write_documents(tmp_path / "a.jsonl.zst", [Document("a:0", "text", "x/y"), Document("a:1", "text", "x y")])
    with pytest.raises(UserError, match="do not all have folder names"):
        run([tmp_path / "a.jsonl.zst"], tmp_path / "s", separate_sources=True)


def shingled(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)


def leaky_corpus(folder: Path) -> list[Path]:
    """Texts of one template, so that all share shingles; a third are edits of others, of similarity 1 down to .5."""
    rng = np.random.default_rng(5)
    vocabulary = ["".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(3000)]
    template = list(rng.choice(vocabulary, 12))
    texts = [[*template, *rng.choice(vocabulary, rng.integers(30, 90))] for _ in range(200)]
    for i in range(100):
        words = list(texts[i])
        for at in rng.choice(len(words), rng.integers(0, 6), replace=False):
            words[at] = str(rng.choice(vocabulary))
        texts.append(words)
    paths = []
    for number in range(2):
        items = [
            Document(f"leaky{number}:{i}", " ".join(words), "web", f"http://x/{i}") for i, words in enumerate(texts[number::2])
        ]
        items.append(Document(f"leaky{number}:dots", "... !!!", "web"))
        paths.append(folder / f"leaky{number}.jsonl.zst")
        write_documents(paths[-1], items)
    return paths


@pytest.mark.parametrize("split_by", ["hash", "tail"])
def test_no_training_document_is_a_near_duplicate_of_a_validation_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split_by: str
) -> None:
    monkeypatch.setattr(leaks, "MERGE_ENTRIES", 300)  # the index is merged in many ranges
    inputs, tokenizer = leaky_corpus(tmp_path), open_tokenizer("bytes")
    run(inputs, tmp_path / "all", validation_fraction=0.3, split_by=split_by)
    summary = run(inputs, tmp_path / "s", validation_fraction=0.3, split_by=split_by, overlap_threshold=0.8)
    before, after, validation = (
        {row["id"]: shingled(row["text"]) for row in read_split(tmp_path / name, tokenizer)}
        for name in ("all/train", "s/train", "s/validation")
    )
    nearest = {name: max(jaccard(found, other) for other in validation.values()) for name, found in before.items()}
    expected = {name for name, similarity in nearest.items() if similarity >= 0.8 and not name.endswith("dots")}
    assert len(expected) > 8
    assert before.keys() - after.keys() == expected
    assert summary.leaked_documents == len(expected)
    lines = [json.loads(line) for line in (tmp_path / "s" / "leaks.jsonl").read_text().splitlines()]
    assert {line["id"]: line["similarity"] for line in lines} == {name: round(nearest[name], 4) for name in expected}
    for line in lines:
        assert jaccard(before[line["id"]], validation[line["validation"]]) == pytest.approx(line["similarity"], abs=5e-5)
        assert line["url"].startswith("http://x/")


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.8, 1.0])
def test_lookups_equal_comparing_with_every_validation_document(tmp_path: Path, threshold: float) -> None:
    rng = np.random.default_rng(8)
    texts = [" ".join(rng.choice(["a", "b"], rng.integers(5, 26))) for _ in range(400)]
    sets = [shingled(text) for text in texts]
    for number in range(2):
        chosen = range(100 * number, 100 * number + 100)
        assert leaks.write_validation([(f"v{i}", texts[i]) for i in chosen], tmp_path / f"{number}") == 100
    leaks.write_validation([], tmp_path / "none")
    leaks.build_index([tmp_path / "0", tmp_path / "none", tmp_path / "1"], tmp_path / "index")
    index = leaks.OverlapIndex(tmp_path / "index", threshold)
    hits = 0
    for answer, shingle_set in zip(index.find(texts[200:]), sets[200:], strict=True):
        similarities = [jaccard(shingle_set, other) for other in sets[:200]]
        best = max(similarities)
        expected = (f"v{similarities.index(best)}", round(best, 4)) if best >= threshold else None
        assert answer == expected
        hits += expected is not None
    assert 0 < hits < 200


def test_leaks_do_not_depend_on_parts(tmp_path: Path) -> None:
    inputs = leaky_corpus(tmp_path)
    values: dict[str, Any] = {"validation_fraction": 0.3, "overlap_threshold": 0.8, "shard_tokens": 20_000}
    run(inputs, tmp_path / "whole", **values)
    for _ in range(3):
        for part in ("1/2", "0/2"):
            run(inputs, tmp_path / "parts", part=part, **values)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_without_validation_documents_nothing_leaks(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl.zst", [Document("a:0", "a few words here", "web")] * 2)
    for fraction in (0, 1e-9):
        summary = run(
            [tmp_path / "a.jsonl.zst"], tmp_path / f"s{fraction}", validation_fraction=fraction, overlap_threshold=0.8
        )
        assert (summary.splits["train"]["documents"], summary.leaked_documents) == (2, 0)


def document_lengths(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    if kind == "web":
        return np.maximum(2, rng.lognormal(6, 1.1, count)).astype(np.int64)
    return {"long": rng.integers(2000, 9000, count), "equal": np.full(count, 300), "tiny": rng.integers(1, 4, count)}[kind]


@pytest.mark.parametrize("kind", ["web", "long", "equal", "tiny"])
@pytest.mark.parametrize("first_token", [0, 777])
@pytest.mark.parametrize("count", [0, 1, 3000])
def test_best_fit_is_an_order_that_cuts_no_more(kind: str, first_token: int, count: int) -> None:
    lengths = document_lengths(kind, count)
    order = best_fit_order(lengths, 1024, first_token)
    assert sorted(order.tolist()) == list(range(count))
    assert num_cut(lengths[order], 1024, first_token) <= num_cut(lengths, 1024, first_token)
    assert order.tolist() == best_fit_order(lengths, 1024, first_token).tolist()


def test_best_fit_leaves_hardly_a_document_cut() -> None:
    lengths = document_lengths("web", 20_000)
    fitting = int((lengths <= 2048).sum())
    before, after = num_cut(lengths, 2048) / fitting, num_cut(lengths[best_fit_order(lengths, 2048, 0)], 2048) / fitting
    assert before > 0.2
    assert after < 0.003
    # The order stays an order of keys on the whole: no trend of length, documents of all places mixed.
    moved = lengths[best_fit_order(lengths, 2048, 0)]
    assert abs(np.corrcoef(np.arange(20_000), moved)[0, 1]) < 0.05


def test_best_fit_fills_by_hand() -> None:
    # Samples of 10, three tokens of the first are taken. 7 fills it; 13 is 10 + 3, and 6 + 1 fill the rest; 9 has nothing to
    # go with but a cut, and 8 comes last.
    lengths = np.array([9, 6, 8, 13, 7, 1])
    assert lengths[best_fit_order(lengths, 10, 3)].tolist() == [7, 13, 6, 1, 9, 8]


def test_packed_shards_hold_the_same_documents_with_fewer_cuts(
    corpus: list[Path], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_fit, "BLOCK_DOCUMENTS", 40)  # several blocks in a shard
    run(corpus, tmp_path / "s", shard_tokens=4000, pack_seq_len=512)
    tokenizer = open_tokenizer("bytes")
    before, after = (read_split(folder / "train", tokenizer) for folder in (packed, tmp_path / "s"))
    assert sorted(row["id"] for row in before) == sorted(row["id"] for row in after)
    cuts = [num_cut(np.array([row["tokens"] for row in rows]), 512) for rows in (before, after)]
    assert cuts[0] > 40
    assert cuts[1] < 0.45 * cuts[0]  # borders of shards are no borders of samples: packing goes on across them
    monkeypatch.setattr(segments, "SEGMENT_TOKENS", 900)
    run(corpus, tmp_path / "t", shard_tokens=4000, pack_seq_len=512)
    assert tree(tmp_path / "s") == tree(tmp_path / "t")


@pytest.mark.realdata
def test_a_lossy_tokenizer_is_refused(corpus: list[Path], shared_data: Path, tmp_path: Path) -> None:
    model = str(shared_data / "tokenizer/sentencepiece/test_model.model")
    with pytest.raises(UserError, match="it rewrites or drops text; require_lossless=false"):
        run(corpus, tmp_path / "s", tokenizer=model)
    assert run(corpus, tmp_path / "s", tokenizer=model, require_lossless=False).complete


def test_the_sample_is_drawn_evenly_and_always_the_same(corpus: list[Path], tmp_path: Path) -> None:
    sample = sample_documents(corpus[0], 5000)
    documents = {document.id: document for document in read_documents(corpus[0])}
    ranked = sorted(documents, key=lambda id: xxhash.xxh3_64_intdigest(id.encode()))
    assert 4000 < sum(len(document.text) for document in sample) <= 5000
    assert {document.id for document in sample} == set(ranked[: len(sample)])
    numbers = [int(document.id.partition(":")[2]) for document in sample]
    assert numbers == sorted(numbers)
    (tmp_path / "small.jsonl").write_bytes(b"x" * 100)
    (tmp_path / "large.jsonl").write_bytes(b"x" * 9000)
    (tmp_path / "other.jsonl").write_bytes(b"x" * 9000)
    budgets = file_budgets(sorted(tmp_path.glob("*.jsonl")), TokenizerConfig(max_characters=6000))
    assert {path.stem: budget for path, budget in budgets.items()} == {"large": 2950, "other": 2950, "small": 2000}
    assert len(file_budgets(sorted(tmp_path.glob("*.jsonl")), TokenizerConfig(max_files=2))) == 2


def test_a_trained_tokenizer_is_kept_for_the_same_documents(corpus: list[Path], tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=320)
    first = train_tokenizer(corpus, tmp_path / "t", config)
    time_before = (tmp_path / "t" / "tokenizer.model").stat().st_mtime_ns
    assert train_tokenizer(corpus, tmp_path / "t", config) == first
    assert (tmp_path / "t" / "tokenizer.model").stat().st_mtime_ns == time_before
    assert first.bytes_per_token > 2
    assert first.documents == 360
    other = train_tokenizer(corpus[:1], tmp_path / "t", config)
    assert other.sample_sha256 != first.sample_sha256
    write_documents(tmp_path / "empty.jsonl.zst", [])
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer([tmp_path / "empty.jsonl.zst"], tmp_path / "t", config)


def test_a_full_disk_leaves_what_was_committed(corpus: list[Path], packed: Path, tmp_path: Path) -> None:
    # A limit on file size stops writes the way a full disk does, in the middle of a shard, in a process of its own.
    program = f"""
import resource, signal, sys
from pathlib import Path
from megagpt.corpus.packing import tokenize_documents as pack
from megagpt.corpus.runner import run_phase as phases
from megagpt.corpus.runner.config import Execution

def run_here(tasks, execution, consume, describe=str):
    for key, function, arguments in tasks:
        consume(key, function(*arguments))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
pack.run_tasks = phases.run_tasks = run_here
write = pack.ShardWriter.close
number = 0

def close(writer):
    global number
    number += 1
    if number == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    return write(writer)

if sys.argv[1] == "full":
    pack.ShardWriter.close = close
config = pack.TokenizeConfig(validation_fraction=0.1, overlap_threshold=None, shard_tokens=4000)
inputs = [Path(path) for path in {[str(path) for path in corpus]!r}]
pack.pack_documents(inputs, Path({str(tmp_path / "s")!r}), "bytes", config, Execution(num_workers=1))
assert "pandas" not in sys.modules  # half a second and 40 MB in every worker
"""
    failed = subprocess.run([sys.executable, "-c", program, "full"], capture_output=True, text=True, timeout=900)
    assert failed.returncode == 1
    assert "OSError: [Errno 27] File too large" in failed.stderr
    files = {path.name for path in (tmp_path / "s" / "train").iterdir()}
    assert files == {f"shard_0000{i}{suffix}" for i in (0, 1) for suffix in (".bin", ".idx", ".docs.parquet")}
    subprocess.run([sys.executable, "-c", program, "room"], check=True, capture_output=True, timeout=900)
    assert tree(tmp_path / "s") == tree(packed)


def test_a_full_disk_leaves_no_tokenizer_and_a_rerun_trains_it(
    corpus: list[Path], project: Path, small_disk: SmallDisk
) -> None:
    inputs = f"tokenizer.inputs=[{','.join(map(str, corpus))}]"
    command = [sys.executable, "tools/train_tokenizer.py", f"work_dir={small_disk.path}", "tokenizer.vocab_size=320", inputs]
    small_disk.resize(4)
    failed = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    model = small_disk.path / "tokenizer/tokenizer.model"
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"error: the disk is full while writing {model}: everything committed")
    assert list(model.parent.iterdir()) == []
    small_disk.resize(1 << 10)
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    assert open_tokenizer(model).vocab_size == 320
