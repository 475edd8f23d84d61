"""inspect_data: statistics, faults that are named, lineage of tokens, rejected documents, and the ledger of a run."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megagpt.command import run_words
from megagpt.config import UserError, dump, validate
from megagpt.corpus.readers.warc import Record, read_records
from megagpt.corpus.runner.blocks import Block
from megagpt.data.open_data import DataConfig, open_data
from megagpt.data.sample_hash import recompute_fed_hash
from megagpt.data.sample_ledger import Entry, LedgerWriter, read_ledger
from megagpt.data.shards import Manifest, ShardError, ShardWriter, write_manifest
from megagpt.data.state import TrainState
from megagpt.documents import Document, write_documents
from megagpt.files import write_json, write_text
from megagpt.report.inspect_data import InspectConfig, check_ledger, inspect
from megagpt.report.provenance import show_record
from megagpt.tokenizer.open_tokenizer import open_tokenizer

TEXTS = [f"Text number {i}. " * (i % 5 + 1) for i in range(40)]


def write_shards(folder: Path, *, extra: int | None = None) -> Path:
    """Two shards of TEXTS in train/; `extra` is an id put into the middle of one document."""
    tokenizer, infos = open_tokenizer("bytes"), []
    for number in range(2):
        with ShardWriter(folder / "train", f"shard_{number:05d}", np.dtype("uint16")) as writer:
            for i, text in enumerate(TEXTS[20 * number : 20 * number + 20], start=20 * number):
                ids = [*tokenizer.encode(text), 256]
                if extra is not None and i == 23:
                    ids[3] = extra
                rows = {"id": f"dump.warc.gz:{i}", "url": f"http://x/{i}", "source": "web" if i % 2 else "wiki"}
                writer.add(np.array(ids, np.uint32), text_bytes=len(text.encode()), **rows)
            infos.append(writer.close())
    write_manifest(folder / "train", Manifest("train", "uint16", 257, 256, tokenizer.fingerprint, "", tuple(infos)))
    tokenizer.save(folder / "tokenizer")
    return folder


def lines(**values: object) -> list[str]:
    return list(
        inspect(validate(InspectConfig, {k: v if isinstance(v, int) else str(v) for k, v in values.items()}, source="test"))
    )


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_statistics_count_what_was_written(tmp_path: Path) -> None:
    found = lines(shards=write_shards(tmp_path))
    size = sum(len(text) for text in TEXTS)
    assert (
        found[1]
        == f"  2 shards, 40 documents, {size + 40:,} tokens, {size:,} bytes of text, {size / (size + 40):.3f} bytes per token"
    )
    assert [line for line in found if "source wiki: 20 documents" in line]
    assert sum(int(line.split(": ")[1].split()[0]) for line in found if " to " in line) == 40


def test_verify_names_every_fault(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    size = sum(len(text) for text in TEXTS) + 40
    assert lines(shards=folder, verify=True) == [f"{folder / 'train'}: sound, {size:,} tokens in 2 shards"]
    flip(folder / "train" / "shard_00000.bin", 10)
    flip(folder / "train" / "shard_00001.docs.parquet", 40)
    with pytest.raises(ShardError) as caught:
        lines(shards=folder, verify=True)
    message = str(caught.value)
    assert message.startswith("2 problems found:")
    assert "shard_00000.bin: block 0" in message
    assert "shard_00001.docs.parquet: sha256" in message
    flip(folder / "train" / "shard_00000.idx", 40)
    with pytest.raises(ShardError, match=r"shard_00000\.idx: sha256 differs"):
        lines(shards=folder, verify=True)


@pytest.mark.parametrize(
    ("extra", "message"), [(256, "41 end-of-text tokens, 40|21 end-of-text tokens, 20"), (300, "has id 300")]
)
def test_verify_looks_at_the_tokens_too(tmp_path: Path, extra: int, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        lines(shards=write_shards(tmp_path, extra=extra), verify=True)


def test_verify_knows_the_tokenizer(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    values = json.loads((folder / "train" / "manifest.json").read_text())
    write_json(folder / "train" / "manifest.json", {**values, "tokenizer_sha256": "00"})
    with pytest.raises(ShardError, match=r"tokenizer: sha256 .* is not the shards' 00"):
        lines(shards=folder, verify=True)


def test_lineage_of_tokens(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    start = sum(len(text) + 1 for text in TEXTS[:19])
    found = lines(shards=folder, token=start + 5, num_tokens=len(TEXTS[19]) - 4 + 3)
    assert found[0].endswith(f"tokens 5 to {len(TEXTS[19]) + 1} of {len(TEXTS[19]) + 1} of dump.warc.gz:19 (web) http://x/19")
    assert found[1].strip() == json.dumps(TEXTS[19][5:])
    assert found[2].startswith("shard_00001.docs.parquet row 0: tokens 0 to 3 of")
    assert found[3].strip() == '"Tex"'
    with pytest.raises(UserError, match=r"token=999999 num_tokens=1: the split has"):
        lines(shards=folder, token=999_999)


@pytest.mark.realdata
def test_the_record_of_a_token(tmp_path: Path, shared_data: Path) -> None:
    dump = shared_data / "warc" / "cc-main-2020-34.warc.gz"
    records = [record for record in read_records(Block(str(dump), dump.name)) if isinstance(record, Record)]
    pages = [record for record in records if record.type == "response"][:2]
    tokenizer = open_tokenizer("bytes")
    with ShardWriter(tmp_path / "train", "shard_00000", np.dtype("uint16")) as writer:
        for page in pages:
            writer.add(np.array([65, 66, 256]), id=page.where, url=page.url, source="web", text_bytes=2)
        info = writer.close()
    write_manifest(tmp_path / "train", Manifest("train", "uint16", 257, 256, tokenizer.fingerprint, "", (info,)))
    tokenizer.save(tmp_path / "tokenizer")
    for dumps in (dump, dump.parent.parent):
        found = lines(shards=tmp_path, token=4, dumps=dumps)
        assert found[1].strip().startswith('"B')
        assert found[2].startswith(f"  {dump}, byte {pages[1].where.rpartition(':')[2]}: response, ")
        assert f"    warc-target-uri: {pages[1].url}" in found
        assert any(line.startswith("    | HTTP/1.1 200") for line in found)
    with pytest.raises(UserError, match=r"the source of .*, is missing"):
        lines(shards=tmp_path, token=4, dumps=tmp_path)
    with pytest.raises(UserError, match="no record at"):
        list(show_record(dump, f"{dump.name}:1"))


def test_rejected_documents_by_reason(tmp_path: Path) -> None:
    documents = [
        Document(f"a:{i}", f"text {i}", "web", meta={"rejected": "length:short" if i % 2 else "c4:lorem"}) for i in range(6)
    ]
    write_documents(tmp_path / "rejected" / "a.jsonl.zst", documents)
    write_json(tmp_path / "summary.json", {"documents_in": 20, "kept": 10, "rejected": {"length:short": 7, "c4:lorem": 3}})
    found = lines(stage=tmp_path, num_examples=2)
    assert found[0] == f"{tmp_path}: 20 documents in, 10 kept, 10 rejected"
    assert found[1:6] == ["length:short: 7", "  a:1", '    "text 1"', "  a:3", '    "text 3"']
    assert lines(stage=tmp_path, reason="c4", num_examples=0)[1:] == ["c4:lorem: 3"]
    with pytest.raises(UserError, match=r"no summary\.json"):
        lines(stage=tmp_path / "rejected")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 5 steps of 4 samples, the last three made by a second start with 3 ranks."""
    config = validate(
        DataConfig,
        {"sources": {"a": {"path": str(write_shards(tmp_path / "s"))}}, "seq_len": 20, "shuffle_block": 2},
        source="t",
    )
    run = tmp_path / "run"
    write_text(run / "config.yaml", "data:\n" + "".join(f"  {line}\n" for line in dump(config).splitlines()))
    for attempt, size in ((1, 1), (2, 3)):
        write_json(run / "starts" / f"{attempt:04d}.json", {"world_size": size, "config": {"micro_batch_size": 1}})
    data, writer = open_data(config), LedgerWriter(run)
    for step, attempt in [(0, 1), (1, 1), (2, 1), (2, 2), (3, 2), (4, 2)]:
        fed_hash = recompute_fed_hash(data.train, TrainState(samples=4 * step), 4)
        writer.write(Entry(step, 4 * step, 4, fed_hash, attempt))
    writer.close()
    return run


def test_ledger_that_agrees(run_dir: Path) -> None:
    assert lines(run_dir=run_dir) == [f"{run_dir}: steps 0 to 4, samples 0 to 20, all as in the shards"]


def test_documents_in_a_batch(run_dir: Path) -> None:
    found = lines(run_dir=run_dir, step=3)
    assert found[0].endswith(", as in the shards")
    assert [line.split(":")[0] for line in found if line.startswith("sample")] == [f"sample {i}" for i in (12, 13, 14, 15)]
    config = json.loads(json.dumps(found))
    assert any("dump.warc.gz:" in line for line in config)
    # Samples 12 to 15 on 3 ranks, one a micro-batch: rank 0 has the first and the last.
    mine = [line.split(":")[0] for line in lines(run_dir=run_dir, step=3, rank=0) if line.startswith("sample")]
    assert mine == ["sample 12", "sample 15"]
    with pytest.raises(UserError, match="rank=3: step 3 had ranks 0 to 2"):
        lines(run_dir=run_dir, step=3, rank=3)
    with pytest.raises(UserError, match="step=9: the ledger has steps 0 to 4"):
        lines(run_dir=run_dir, step=9)


def test_ledger_that_does_not_agree(run_dir: Path) -> None:
    path = run_dir / "ledger.jsonl"
    entries = read_ledger(path.parent)
    path.write_text("")
    writer = LedgerWriter(run_dir)
    for entry in entries:
        if entry.step != 1:
            writer.write(replace(entry, fed_hash=entry.fed_hash ^ (entry.step == 4)))
    writer.close()
    with pytest.raises(UserError) as caught:
        list(check_ledger(run_dir))
    faults = str(caught.value).split("\n  ")[1:]
    assert faults[0] == "step 2 follows step 0: steps are missing"
    assert faults[1].startswith(f"step 4: fed_hash {entries[-1].fed_hash ^ 1}, the shards give {entries[-1].fed_hash}")


def test_skipped_and_repeated_samples_are_said(run_dir: Path) -> None:
    path = run_dir / "ledger.jsonl"
    data = open_data(validate(DataConfig, json.loads(json.dumps(_data_section(run_dir))), source="t"))
    path.write_text("")
    writer = LedgerWriter(run_dir)
    for step, first in enumerate([0, 4, 12, 14]):
        writer.write(Entry(step, first, 4, recompute_fed_hash(data.train, TrainState(samples=first), 4), 1))
    writer.close()
    assert list(itertools.islice(check_ledger(run_dir), 1, None)) == [
        "  samples 8 to 12 were left out",
        "  samples 14 to 16 were used twice",
    ]


def _data_section(run_dir: Path) -> dict:
    from megagpt.config import read_yaml

    return read_yaml(run_dir / "config.yaml")["data"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of shards, stage, work_dir and run_dir, not none"),
        (["shards=a", "stage=b"], "not shards and stage"),
        (["run_dir=a", "rank=1"], "rank needs step"),
        (["work_dir=a"], "give url and work_dir together"),
        (["work_dir=/nonexistent", "url=x"], "no stage has run here"),
        (["shards=/nonexistent"], r"no manifest.json at or below it"),
        (["run_dir=/nonexistent"], "cannot read the configuration file"),
    ],
)
def test_mistakes_end_with_status_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import inspect_data  # pyright: ignore[reportMissingImports] (tools/ is on the path of tests)

    assert run_words(InspectConfig, inspect_data.run, inspect_data.__doc__ or "", words) == 2
    assert message in capsys.readouterr().err
