"""What a resume finds changed in its data: refused by name, or continued without repeating a sample."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import settings, write_shards

from megagpt.checkpoint.tokenizers import keep_tokenizer, tokenizer_of
from megagpt.config import UserError, validate
from megagpt.data.mixture import Mixture
from megagpt.data.open_data import Data, DataConfig, open_data
from megagpt.data.shards import Manifest, ShardWriter, write_manifest
from megagpt.data.state import TrainState, sample_indices
from megagpt.files import read_json, write_json
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.extended import extend, extends
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.train.config import TrainConfig
from megagpt.train.data_changes import continue_mixture, record_of
from megagpt.train.preflight import check_initial, check_resume, refuse_longer_context

Sources = dict[str, tuple[Path, float]]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five corpora of different texts, by name."""
    return {name: write_shards(tmp_path_factory.mktemp(name), seed=seed) for seed, name in enumerate("abcde")}


def make(run_dir: Path, sources: Sources, *, data: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    values = settings(Path("none"), run_dir, **changes)
    section = {name: {"path": str(path), "weight": weight} for name, (path, weight) in sources.items()}
    values["data"] = {**values["data"], "sources": section, **(data or {})}
    return validate(TrainConfig, values, source="test")


def saved_by(config: TrainConfig, data: Data, state: TrainState) -> dict[str, Any]:
    """state.json of a checkpoint, as far as a resume reads it."""
    info = {"config": config.model_dump(mode="json"), "model": config.model.model_dump(mode="json"), **record_of(data)}
    return json.loads(json.dumps({**info, "train_state": state.to_json()}))


class Course:
    """A run over several starts, each with its own settings: which sample of which source every global sample was."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.where = run_dir, run_dir / "checkpoints" / "step_00000001"
        self.used: list[tuple[str, int]] = []
        self.seeds: dict[str, int] = {}
        self.saved: dict[str, Any] | None = None

    def start(self, config: TrainConfig, samples: int) -> None:
        """Resume, or begin, and draw so many samples."""
        data, state = open_data(config.data), TrainState()
        if self.saved is not None:
            check_resume(config, data, self.saved, self.where)
            state = TrainState.from_json(self.saved["train_state"])
            state = continue_mixture(config.data, self.saved, state, self.where)
        train = data.train.continued(state.mixture)
        for index in sample_indices(state, samples):
            source, position = train.locate(index)
            self.used.append((train.names[source], position))
            seed = train.datasets[source].seed  # type: ignore[attr-defined]
            assert self.seeds.setdefault(train.names[source], seed) == seed, "the source has another order now"
        self.saved = saved_by(config, data, state.advance(samples, 0))

    def assert_nothing_is_repeated_or_left_out(self) -> None:
        assert len(set(self.used)) == len(self.used)
        for name in {name for name, _ in self.used}:
            positions = [position for other, position in self.used if other == name]
            assert positions == list(range(len(positions))), name


def test_sources_that_come_go_and_change_places_continue_by_name(corpora: dict[str, Path], tmp_path: Path) -> None:
    a, b, c, d = (corpora[name] for name in "abcd")
    course = Course(tmp_path)
    course.start(make(tmp_path, {"a": (a, 3.0), "b": (b, 1.0), "c": (c, 1.0)}), 101)
    course.start(make(tmp_path, {"a": (a, 3.0), "c": (c, 1.0)}), 50)  # b removed
    course.start(make(tmp_path, {"a": (a, 3.0), "c": (c, 1.0)}), 17)  # the same again
    course.start(make(tmp_path, {"c": (c, 1.0), "a": (a, 3.0)}), 33)  # another order
    course.start(make(tmp_path, {"c": (c, 1.0), "d": (d, 2.0), "a": (a, 3.0)}), 60)  # d added
    course.start(make(tmp_path, {"b": (b, 1.0), "d": (d, 2.0)}), 40)  # b comes back
    course.assert_nothing_is_repeated_or_left_out()
    counts = {name: sum(other == name for other, _ in course.used[-40:]) for name in "bd"}
    assert counts == {"b": 13, "d": 27} or counts == {"b": 14, "d": 26}


def test_weights_that_are_allowed_to_change_repeat_nothing(corpora: dict[str, Path], tmp_path: Path) -> None:
    course = Course(tmp_path)
    course.start(make(tmp_path, {"a": (corpora["a"], 1.0), "b": (corpora["b"], 1.0)}), 100)
    changed = {"a": (corpora["a"], 1.0), "b": (corpora["b"], 3.0)}
    with pytest.raises(UserError) as raised:
        course.start(make(tmp_path, changed), 100)
    assert "data.weights (sources.b.weight: 1.0 -> 3.0)" in str(raised.value)
    assert "data.weight_changes=[{from_sample: 100, weights: ...}]" in str(raised.value)
    assert "allow_change" not in str(raised.value)
    course.start(make(tmp_path, changed, allow_change=["data.weights"]), 100)
    course.start(make(tmp_path, changed), 100)
    course.assert_nothing_is_repeated_or_left_out()
    assert sum(name == "b" for name, _ in course.used) == 50 + 150


def test_planned_weights_are_no_change_before_they_begin(corpora: dict[str, Path], tmp_path: Path) -> None:
    sources = {"a": (corpora["a"], 1.0), "b": (corpora["b"], 1.0)}
    planned = {"weight_changes": [{"from_sample": 100, "weights": {"b": 3.0}}]}
    course = Course(tmp_path)
    course.start(make(tmp_path, sources), 100)
    course.start(make(tmp_path, sources, data=planned), 60)
    course.start(make(tmp_path, sources, data=planned), 40)
    course.assert_nothing_is_repeated_or_left_out()
    assert sum(name == "b" for name, _ in course.used) == 50 + 75
    with pytest.raises(UserError, match=r"data\.weights"):
        course.start(make(tmp_path, sources), 10)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({"seed": 5}, "data.order (seed: 0 -> 5)"),
        ({"shuffle_block": 2}, "data.order (shuffle_block: 4 -> 2)"),
        ({"seq_len": 16}, "data.seq_len (seq_len: 32 -> 16)"),
        ({"document_mask": True}, "data.seq_len (document_mask: False -> True)"),
        ({"document_end_loss": False}, "data.seq_len (document_end_loss: True -> False)"),
        ({"sources": "other shards"}, "data.shards (other shards of a)"),
    ],
)
def test_each_kind_of_change_is_refused_and_allowed_by_its_own_name(
    data: dict[str, Any], kind: str, corpora: dict[str, Path], tmp_path: Path
) -> None:
    before = make(tmp_path, {"a": (corpora["a"], 1.0)})
    saved = saved_by(before, open_data(before.data), TrainState(1, 8, 256))
    sources: Sources = {"a": (corpora["b" if "sources" in data else "a"], 1.0)}
    changes = {} if "sources" in data else data

    def resume(*allowed: str) -> None:
        config = make(tmp_path, sources, data=changes, allow_change=list(allowed))
        check_resume(config, open_data(config.data), saved, tmp_path / "checkpoints" / "step_00000001")

    name = kind.partition(" ")[0]
    with pytest.raises(UserError) as raised:
        resume()
    assert kind in str(raised.value)
    assert f"allow_change=[{name}]" in str(raised.value)
    repeats = "some samples of this epoch come twice and others never" in str(raised.value)
    assert repeats == (name in ("data.order", "data.shards")), "what it costs is said where it is offered"
    resume(name)
    resume("data")
    with pytest.raises(UserError):
        resume(*({"data.shards", "data.order", "data.weights", "data.seq_len", "data.tokenizer"} - {name}))


# ---- longer samples


def longer(run_dir: Path, sources: Sources, seq_len: int, begin: Path | None, **changes: Any) -> TrainConfig:
    scaling = {} if seq_len == 32 else {"rope_scaling": {"kind": "yarn", "factor": seq_len / 32, "original_seq_len": 32}}
    model = {"vocab_size": 257, "seq_len": seq_len, "num_layers": 2, "num_heads": 2, "hidden_size": 32, **scaling}
    return make(run_dir, sources, data={"seq_len": seq_len}, **{"model": model, "continue_from": begin, **changes})


def test_longer_samples_continue_each_source_with_tokens_it_has_not_given(corpora: dict[str, Path], tmp_path: Path) -> None:
    """32, 64 and 128 tokens; a source that goes and comes back after the change continues too. The ledger agrees."""
    a, b = (corpora["a"], 1.0), (corpora["b"], 1.0)
    starts: list[tuple[int, Sources, int]] = [
        (32, {"a": a, "b": b}, 150), (64, {"a": a}, 20), (64, {"a": a, "b": b}, 30), (128, {"b": b, "a": a}, 6),
    ]  # fmt: skip
    used: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    saved: dict[str, Any] | None = None
    for number, (seq_len, sources, samples) in enumerate(starts):
        where = tmp_path / str(number - 1) / "checkpoints" / "step_00000001"
        config = longer(tmp_path / str(number), sources, seq_len, where if number else None)
        data, state = open_data(config.data), TrainState()
        if saved is not None:
            check_resume(config, data, saved, where)
            state = continue_mixture(config.data, saved, TrainState.from_json(saved["train_state"]), where)
        train = data.train.continued(state.mixture)
        for index in sample_indices(state, samples):
            source, position = train.locate(index)
            first = train.datasets[source].first_token(position)  # type: ignore[attr-defined]
            used[train.names[source]].append((first, first + seq_len))
            assert len(train.sample(index).inputs) == seq_len
        saved = saved_by(config, data, state.advance(samples, 0))
        again = TrainState.from_json(saved["train_state"])
        assert continue_mixture(config.data, saved, again, where) == again, "a resume with the same settings changes nothing"
    for name, ranges in used.items():
        ranges.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges)), name
    assert sum(end - start for start, end in used["a"]) == 75 * 32 + (20 + 15) * 64 + 3 * 128


def test_only_a_run_that_begins_with_a_checkpoint_may_have_longer_samples(corpora: dict[str, Path], tmp_path: Path) -> None:
    sources: Sources = {"a": (corpora["a"], 1.0)}
    before = longer(tmp_path / "one", sources, 32, None)
    saved, where = saved_by(before, open_data(before.data), TrainState(1, 8, 256)), tmp_path / "one/checkpoints/step_00000001"

    def resume(config: TrainConfig) -> None:
        check_resume(config, open_data(config.data), saved, where)

    resume(longer(tmp_path / "two", sources, 64, where))
    with pytest.raises(UserError, match=r"data.seq_len \(seq_len: 32 -> 64\)"):
        resume(longer(tmp_path / "one", sources, 64, None))
    with pytest.raises(UserError, match=r"model \(hidden_size: 32 -> 64"):
        resume(
            longer(tmp_path / "two", sources, 64, where, model={**MODEL, "vocab_size": 257, "seq_len": 64, "hidden_size": 64})
        )
    config = longer(tmp_path / "two", sources, 64, where)
    masked = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": True})})
    with pytest.raises(UserError, match=r"data.seq_len \(document_mask: False -> True, seq_len: 32 -> 64\)"):
        resume(masked)
    too_long = longer(tmp_path / "two", sources, 256, where)
    with pytest.raises(UserError) as raised:
        continue_mixture(too_long.data, saved, TrainState(1, 8, 256), where)
    assert "source a was shuffled in runs of 4 x 32 tokens" in str(raised.value)
    assert "samples of at most 128 tokens can continue it" in str(raised.value)


def test_a_longer_context_with_the_same_rotary_positions_is_refused(corpora: dict[str, Path], tmp_path: Path) -> None:
    sources: Sources = {"a": (corpora["a"], 1.0)}
    before = longer(tmp_path / "one", sources, 32, None)
    where = tmp_path / "one" / "checkpoints" / "step_00000001"
    write_json(where / "state.json", saved_by(before, open_data(before.data), TrainState(1, 8, 256)))
    model = {**MODEL, "vocab_size": 257, "seq_len": 64}
    for begin in ({"continue_from": where}, {"init_from": tmp_path / "one", "continue_from": None}):
        with pytest.raises(UserError) as raised:
            refuse_longer_context(longer(tmp_path / "two", sources, 64, None, **{"model": model, **begin}))
        assert str(raised.value) == (
            f"data.seq_len=64: {where} was trained with 32 tokens and the same rotary positions; stretch them: "
            "model.rope_scaling={kind: yarn, factor: 2, original_seq_len: 32} (or llama3), or a larger model.rope_theta than "
            "10000; allow_change=[data.seq_len] takes them as they are"
        )
        refuse_longer_context(longer(tmp_path / "two", sources, 64, None, **begin))
        for more in ({"allow_change": ["data.seq_len"]}, {"model": {**model, "rope_theta": 50_000.0}}):
            refuse_longer_context(longer(tmp_path / "two", sources, 64, None, **{"model": model, **begin, **more}))


# ---- tokenizers


def sentencepiece_of(folder: Path, text: str, vocab_size: int) -> Tokenizer:
    from megagpt.tokenizer.sentencepiece import train_sentencepiece

    train_sentencepiece(iter([text] * 50), folder, vocab_size=vocab_size)
    return open_tokenizer(folder)


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """Of equal size, and of other texts."""
    folder = tmp_path_factory.mktemp("tokenizers")
    first = sentencepiece_of(folder / "one", "the cat sat on the mat and the dog lay by the log", 290)
    return first, sentencepiece_of(folder / "two", "zwölf boxkämpfer jagen viktor quer über den großen sylter deich", 290)


def corpus_of(root: Path, tokenizer: Tokenizer) -> Path:
    """Shards of a tokenizer's random ids."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        with ShardWriter(root / split, "shard_00000", np.dtype("uint16")) as writer:
            for i in range(40):
                ids = rng.integers(0, tokenizer.vocab_size, 60).astype(np.uint32)
                writer.add(np.append(ids, tokenizer.eot_id).astype(np.uint32), id=f"d:{i}", source="t", text_bytes=60)
            info = writer.close()
        manifest = Manifest(split, "uint16", tokenizer.vocab_size, tokenizer.eot_id, tokenizer.fingerprint, "", (info,))
        write_manifest(root / split, manifest)
    tokenizer.save(root / "tokenizer")
    return root


MODEL = {"vocab_size": 320, "seq_len": 32, "num_layers": 2, "num_heads": 2, "hidden_size": 32}


@pytest.mark.parametrize("recorded", [True, False])
def test_another_tokenizer_of_equal_size_is_refused_by_name(
    recorded: bool, two_tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path
) -> None:
    """Also where the checkpoint is of release 0.1, which kept no hash but the folder."""
    one, two = two_tokenizers
    before = make(tmp_path / "run", {"a": (corpus_of(tmp_path / "one", one), 1.0)}, model=MODEL)
    saved = saved_by(before, open_data(before.data), TrainState(1, 8, 256))
    if not recorded:
        del saved["tokenizer_sha256"], saved["data_manifests"]
    keep_tokenizer(tmp_path / "run", one)
    where = tmp_path / "run" / "checkpoints" / "step_00000001"
    other = corpus_of(tmp_path / "two", two)

    def check(check: Callable[..., None], *allowed: str) -> None:
        config = make(tmp_path / "run", {"a": (other, 1.0)}, model=MODEL, allow_change=list(allowed))
        check(config, open_data(config.data), saved, where)

    named = f"{one.fingerprint[:12]} -> {two.fingerprint[:12]}"
    with pytest.raises(UserError, match=rf"data\.tokenizer \(sha256 {named}\)"):
        check(check_resume)
    with pytest.raises(UserError, match=rf"data\.tokenizer \(sha256 {named}\)"):
        check(check_resume, "data")
    with pytest.raises(UserError, match=rf"was trained with another tokenizer \(sha256 {named}\)"):
        check(check_initial)
    check(check_resume, "data", "data.tokenizer")
    check(check_initial, "data.tokenizer")


class Longer:
    """A tokenizer with more ids behind those of another one."""

    def __init__(self, other: Tokenizer, *more: bytes) -> None:
        self.kind, self.eot_id, self.lossless = other.kind, other.eot_id, other.lossless
        self.vocab_size, self.fingerprint = other.vocab_size + len(more), "f" * 64
        self._bytes = [*other.token_bytes(), *more]

    def token_bytes(self) -> list[bytes]:
        return self._bytes


def test_a_tokenizer_that_extends_another_is_told_from_one_that_does_not(
    two_tokenizers: tuple[Tokenizer, Tokenizer],
) -> None:
    one, two = two_tokenizers
    assert extends(one, one)
    assert extends(Longer(one, b"new"), one)  # type: ignore[arg-type]
    assert not extends(one, Longer(one, b"new"))  # type: ignore[arg-type]
    assert not extends(two, one)
    changed = Longer(one)
    changed._bytes[10] += b"x"
    assert not extends(changed, one)  # type: ignore[arg-type]


def test_a_resume_accepts_a_tokenizer_that_extends_the_checkpoints_and_refuses_one_that_lacks_ids(
    two_tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = two_tokenizers
    longer = extend(one, ["<|im_start|>"], [], None)
    corpora = {name: corpus_of(tmp_path / name, tokenizer) for name, tokenizer in (("one", one), ("longer", longer))}
    keep_tokenizer(tmp_path / "run", one)
    where = tmp_path / "run" / "checkpoints" / "step_00000001"

    def resume(before: str, now: str) -> None:
        old, new = (make(tmp_path / "run", {"a": (corpora[name], 1.0)}, model=MODEL) for name in (before, now))
        keep_tokenizer(tmp_path / "run", open_data(old.data).tokenizer)
        saved = saved_by(old, open_data(old.data), TrainState(1, 8, 256))
        allowed = new.model_copy(update={"allow_change": ("data.shards",)})
        check_resume(allowed, open_data(new.data), saved, where)

    with caplog.at_level("INFO"):
        resume("one", "longer")
    assert f"the tokenizer extends that of {where}: its 290 ids mean the same, 1 are new" in caplog.text
    where.mkdir(parents=True)  # from here on a later tokenizer lies beside the first
    with pytest.raises(UserError, match=r"data\.tokenizer \(sha256 "):
        resume("longer", "one")


def test_a_tokenizer_is_never_replaced_under_older_checkpoints(
    two_tokenizers: tuple[Tokenizer, Tokenizer], tmp_path: Path
) -> None:
    one, two = two_tokenizers
    assert keep_tokenizer(tmp_path, two) == tmp_path / "tokenizer"
    assert keep_tokenizer(tmp_path, one) == tmp_path / "tokenizer"  # no checkpoint yet
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert keep_tokenizer(tmp_path, one) == tmp_path / "tokenizer"
    assert keep_tokenizer(tmp_path, two) == tmp_path / f"tokenizer_{two.fingerprint[:12]}"
    for sha256, expected in ((None, one), (one.fingerprint, one), (two.fingerprint, two)):
        assert tokenizer_of(tmp_path, sha256).fingerprint == expected.fingerprint
    with pytest.raises(UserError, match="is not that of the checkpoint's tokenizer"):
        tokenizer_of(tmp_path, "0" * 64)


def test_a_loss_across_document_ends_is_counted_unless_it_is_not_wanted(corpora: dict[str, Path]) -> None:
    section = {"seq_len": 32, "sources": {"a": {"path": str(corpora["a"])}}}
    counted = open_data(validate(DataConfig, section, source="t"))
    ignored = open_data(validate(DataConfig, {**section, "document_end_loss": False}, source="t"))
    ends = 0
    for index in range(50):
        with_loss, without = counted.train.sample(index), ignored.train.sample(index)
        assert np.array_equal(with_loss.inputs, without.inputs)
        at_end = with_loss.inputs == counted.eot_id
        assert np.array_equal(without.targets, np.where(at_end, -100, with_loss.targets))
        ends += int(at_end.sum())
    assert ends > 10
    assert counted.fingerprint != ignored.fingerprint
    (name, dataset), *_ = ignored.validation.items()
    assert name == "a"
    assert not dataset.document_end_loss


def test_a_train_state_without_a_mixture_is_written_as_before() -> None:
    assert TrainState(3, 24, 100).to_json() == {"step": 3, "samples": 24, "tokens": 100, "skipped": ()}
    assert isinstance(Mixture, type)


def test_the_ledger_is_checked_by_what_each_start_drew_from(corpora: dict[str, Path], tmp_path: Path) -> None:
    from dataclasses import asdict

    from megagpt.data.loader import step_batches
    from megagpt.data.sample_ledger import LedgerWriter, entry_of
    from megagpt.files import write_text
    from megagpt.report.inspect_data import check_ledger

    writer, saved, state = LedgerWriter(tmp_path), None, TrainState()
    starts: list[Sources] = [
        {"a": (corpora["a"], 3.0), "b": (corpora["b"], 1.0)},
        {"b": (corpora["b"], 1.0), "c": (corpora["c"], 1.0)},
    ]
    for attempt, sources in enumerate(starts, start=1):
        config = make(tmp_path, sources)
        data = open_data(config.data)
        if saved is not None:
            state = continue_mixture(config.data, saved, state, tmp_path / "checkpoints" / "step_1")
        record = {"world_size": 1, "config": config.model_dump(mode="json")}
        mixture = {"mixture": asdict(state.mixture)} if state.mixture else {}
        write_json(tmp_path / "starts" / f"{attempt:04d}.json", {**record, **mixture})
        for _ in range(4):
            batches = step_batches(data.train, state, global_batch_size=8, micro_batch_size=4, rank=0, size=1)
            writer.write(entry_of(state, 8, batches.fed_hash, attempt))
            state = state.advance(8, batches.num_targets)
        saved = saved_by(config, data, state)
        write_text(tmp_path / "config.yaml", json.dumps(config.model_dump(mode="json")))
    writer.close()
    (line,) = check_ledger(tmp_path)
    assert line.endswith("steps 0 to 7, samples 0 to 64, all as in the shards")
    second = read_json(tmp_path / "starts" / "0002.json")
    write_json(tmp_path / "starts" / "0002.json", {key: value for key, value in second.items() if key != "mixture"})
    with pytest.raises(UserError, match="step 4: fed_hash"):
        list(check_ledger(tmp_path))
