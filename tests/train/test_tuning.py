"""Freezing, adapters, a vocabulary that has grown, early stopping: on every engine, and as a user runs it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks, wait_until
from small_run import losses, settings, start, write_shards
from toy import MODEL, UNTIED, engines_on, make_engine, train_steps

from megagpt.checkpoint.admin import merge
from megagpt.checkpoint.base_weights import base_path, load_base, read_adapters
from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.new_rows import NewRows
from megagpt.checkpoint.on_disk import FORMAT, list_checkpoints, read_state
from megagpt.checkpoint.partitions import index_of, write_safetensors
from megagpt.checkpoint.save_load import seal
from megagpt.command import EXIT_DONE, EXIT_USER_ERROR
from megagpt.config import UserError, validate
from megagpt.corpus.packing.config import TokenizeConfig
from megagpt.corpus.packing.tokenize_documents import pack_documents
from megagpt.corpus.runner.executors import Execution
from megagpt.data.dataset import Sample, TokenDataset
from megagpt.distributed.world import World
from megagpt.documents import IGNORE
from megagpt.engine.build import whole_shapes
from megagpt.engine.initial_weights import draw_weights
from megagpt.evaluate.evaluate_model import EvaluateConfig, evaluate_run
from megagpt.files import read_json, write_json
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.model.tune import LoraConfig, LoraLinear, TuneConfig, merged, prepare
from megagpt.monitor.metrics import read_metrics
from megagpt.train.config import TrainConfig
from megagpt.train.early_stop import used_up

LORA = TuneConfig(lora=LoraConfig(rank=3, alpha=6, targets=("attention.query", "mlp.*")))
TUNES = {
    "blocks": TuneConfig(freeze_blocks=1),
    "names": TuneConfig(freeze=("blocks.*.mlp.*", "norm.weight")),
    "lora": LORA,
    "lora_and_rows": TuneConfig(lora=LoraConfig(rank=3, also_train=("embedding.weight",))),
}


def write_base(folder: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """A checkpoint with the weights of seed 3; returns them."""
    model = GPT(config)
    initialise(model, seed=3)
    weights = {f"param.{name}": parameter.data.flatten() for name, parameter in model.named_parameters()}
    folder.mkdir(parents=True)
    size, digest = write_safetensors(folder / "pieces_00000.safetensors", weights, dict.fromkeys(weights, "0"))
    write_json(folder / "state.json", {"format": FORMAT, "model": config.model_dump(mode="json"), "config": {}})
    seal(folder, {"pieces_00000.safetensors": {"size": size, "sha256": digest}})
    return {name: value.numpy() for name, value in weights.items()}


def test_merged_adapters_give_the_same_logits() -> None:
    model = GPT(MODEL)
    prepare(model, LORA)
    initialise(model, seed=3)
    model = model.double().eval()
    plain = GPT(MODEL).double().eval()
    values = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in values.items():
            if ".lora_" in name:  # a B of zeros would make this pass without the term
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, parameter in plain.named_parameters():
            a, b = (values.get(name.replace("weight", factor)) for factor in ("lora_a", "lora_b"))
            assert LORA.lora is not None
            parameter.copy_(values[name] if a is None or b is None else merged(values[name], a, b, LORA.lora))
        ids = torch.randint(0, 64, (2, 32), generator=generator)
        torch.testing.assert_close(model(ids), plain(ids), atol=1e-12, rtol=1e-12)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert len(adapted) == 2 * 4
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{factor}" for name in adapted for factor in "ab"}


@pytest.mark.parametrize(
    ("tune", "match"),
    [
        ({"lora": {"targets": ["attention.querry"]}}, r"lora.targets='attention.querry': matches no matrix .* attention.key"),
        ({"lora": {"also_train": ["embeddings"]}}, "also_train='embeddings': matches no parameter"),
        ({"freeze": ["block.*"]}, r"tune.freeze='block.\*': matches no parameter"),
        ({"freeze_blocks": 3}, "freeze_blocks=3: the model has 2 blocks"),
        ({"freeze": ["*"]}, "every parameter is frozen"),
    ],
)
def test_what_matches_nothing_is_refused(tune: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        whole_shapes(MODEL, TuneConfig.model_validate(tune))


def gathered(world: World, partitions: dict[str, Any]) -> dict[str, np.ndarray]:
    """Whole flattened tensors of the ranks' partitions."""
    parts = world.gather([(key, p.start, p.numel, p.data.float().cpu().numpy().copy()) for key, p in partitions.items()])
    whole: dict[str, np.ndarray] = {}
    for key, first, numel, data in (part for rank in parts for part in rank):
        whole.setdefault(key, np.full(numel, np.nan, np.float32))[first : first + len(data)] = data
    return whole


def tuned_steps(world: World, base: str, precision: Any, names: list[str]) -> list[Any]:
    """For each engine and way to tune: losses, frozen weights after the steps, and the names of states."""
    results = []
    for name in names:
        for kind, tune in TUNES.items():
            engine = make_engine(world, name, tune=tune, precision=precision)
            draw_weights(engine, MODEL, seed=1, tune=tune)
            load_base(Path(base), None, engine, world, frozen_only=False)
            engine.refresh(0)
            found = train_steps(engine, world, range(3))
            results.append((name, kind, found, gathered(world, engine.frozen()), sorted(gathered(world, engine.state()))))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_frozen_weights_stay_the_same_bits_without_states(size: int, tmp_path: Path) -> None:
    weights = write_base(tmp_path / "base", MODEL)
    reference: dict[str, list[float]] = {}
    names = engines_on(size) if size > 1 else ["zero1", "zero3", "fsdp"]
    for name, kind, found, frozen, states in run_ranks(tuned_steps, size, tmp_path, str(tmp_path / "base"), "fp32", names)[0]:
        assert frozen, (name, kind)
        for key, value in frozen.items():
            assert np.array_equal(value, weights[key]), (name, kind, key)
        trained = {f"param.{n}" for n in whole_shapes(MODEL, TUNES[kind], trained_only=True)}
        assert {key for key in states if key.startswith("param.")} == trained, (name, kind)
        for state in ("exp_avg", "exp_avg_sq"):
            assert {key.replace(f"{state}.", "param.") for key in states if key.startswith(f"{state}.")} == trained
        expected = reference.setdefault(kind, found)
        assert found == pytest.approx(expected, abs=5e-6), (name, kind)  # fp32 sums in another order
        assert found[0] != found[2]


@pytest.mark.slow
def test_frozen_weights_in_bf16_are_the_rounded_ones(tmp_path: Path) -> None:
    weights = write_base(tmp_path / "base", MODEL)
    names = ["zero1", "zero3", "fsdp"]
    for name, kind, found, frozen, _ in run_ranks(tuned_steps, 2, tmp_path, str(tmp_path / "base"), "bf16", names)[0]:
        for key, value in frozen.items():
            expected = weights[key] if name == "fsdp" else torch.from_numpy(weights[key]).bfloat16().float().numpy()
            assert np.array_equal(value, expected), (name, kind, key)
        assert all(np.isfinite(found))


def resized(world: World, base: str) -> list[dict[str, np.ndarray]]:
    """Weights of a model with more ids that begins with a smaller one."""
    larger, results = UNTIED.model_copy(update={"vocab_size": 70}), []
    for name in ("zero1", "zero3", "fsdp"):
        engine = make_engine(world, name, model=larger)
        draw_weights(engine, larger, seed=1)
        load_base(Path(base), NewRows(61, 32), engine, world, frozen_only=False)
        results.append(gathered(world, engine.state()))
    return results


@pytest.mark.slow
def test_rows_of_new_ids_begin_at_the_mean_of_the_old_ones(tmp_path: Path) -> None:
    weights = write_base(tmp_path / "base", UNTIED)
    for found in run_ranks(resized, 2, tmp_path, str(tmp_path / "base"))[0]:
        for key in ("param.embedding.weight", "param.head.weight"):
            before, now = weights[key].reshape(64, 32), found[key].reshape(70, 32)
            assert np.array_equal(now[:61], before[:61])  # 61 to 63 were padding
            mean = before[:61].astype(np.float64).mean(axis=0).astype(np.float32)
            assert np.array_equal(now[61:], np.tile(mean, (9, 1)))
        assert np.array_equal(found["param.norm.weight"], weights["param.norm.weight"])


# ---- as a user runs it


@pytest.fixture(scope="module")
def base_run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    values = settings(write_shards(folder / "shards"), folder / "run", max_steps=8)
    ranks = start(project, folder, values, 1)
    assert ranks.wait() == [EXIT_DONE], ranks.output()
    return folder / "run"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of chats over bytes, packed: two special tokens more than the base run's tokenizer."""
    folder, rng = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    lines = [{"prompt": "".join(rng.choice(["a", "b"], 6)), "completion": "ab"} for _ in range(120)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    supervised = {"format": "prompt_completion"}
    values = {"pack_seq_len": 96, "validation_fraction": 0.2, "overlap_threshold": None, "supervised": supervised}
    config = validate(TokenizeConfig, values, source="test")
    pack_documents([folder / "rows.jsonl"], folder / "shards", "bytes", config, Execution(num_workers=1, executor="inline"))
    return folder / "shards"


def windows(split: Path) -> list[Sample]:
    data = TokenDataset(split, seq_len=96)
    return [data.window(i) for i in range(data.num_windows())]


def tuned(rows: Path, run_dir: Path, base: Path, **changes: Any) -> dict[str, Any]:
    """Settings that tune the base run's model; it has learned 32 positions, which rotary ones do not limit."""
    values = settings(rows, run_dir, max_steps=8, global_batch_size=4, init_from=str(base), **changes)
    values["allow_change"] = ["data.seq_len"]  # the base was trained on 32 tokens, and rotary positions stay as they are
    values["model"] |= {"vocab_size": 264, "seq_len": 96}
    values["data"] |= {"seq_len": 96, "shuffle_block": 1, "document_mask": True}
    return values


@pytest.mark.slow
def test_adapters_are_saved_alone_resume_elsewhere_and_are_merged(
    base_run: Path, rows: Path, project: Path, tmp_path: Path
) -> None:
    lora = {"lora": {"rank": 4, "dropout": 0.1, "targets": ["*"], "also_train": ["embedding.weight"]}}
    values = tuned(rows, tmp_path / "whole", base_run, tune=lora, engine={"zero_stage": 2})
    whole = start(project, tmp_path / "a", values, 2)
    assert whole.wait() == [EXIT_DONE, EXIT_DONE], whole.output()
    assert "2 are new" in whole.output()
    assert losses(tmp_path / "whole")[8] < losses(tmp_path / "whole")[1]
    [*_, last] = list_checkpoints(tmp_path / "whole")
    kept = {key.removeprefix("param.") for key in index_of(last) if key.startswith("param.")}
    assert kept == {name for name in kept if ".lora_" in name} | {"embedding.weight"}
    assert len(kept) == 2 * 7 * 2 + 1
    # the same with a stop in the middle, and another engine and number of ranks from there on
    values = {**values, "run_dir": str(tmp_path / "parts")}
    values["optim"] = {"lr": 1e-3, "schedule": {"kind": "constant"}}
    first = start(project, tmp_path / "b", values, 2, "max_steps=2")
    assert first.wait() == [EXIT_DONE, EXIT_DONE], first.output()
    for words in (("engine.kind=fsdp",), ("engine.kind=deepspeed", "engine.zero_stage=3")):
        second = start(project, tmp_path / "c", values, 1, *words, f"max_steps={3 + (words[0] != 'engine.kind=fsdp')}")
        assert second.wait() == [EXIT_DONE], second.output()
        assert "resumed True" in second.output()
    # merged: one model that gives the logits of base and adapters
    merge(tmp_path / "whole", tmp_path / "merged")
    ours, both = load_model(tmp_path / "whole").model, load_model(tmp_path / "merged").model
    ids = torch.randint(0, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(ids), both(ids))
    base, adapters = load_model(base_run).model, read_adapters(last)
    a, b = adapters["blocks.1.mlp.up"]
    difference = ours.get_parameter("blocks.1.mlp.up.weight") - base.get_parameter("blocks.1.mlp.up.weight")
    torch.testing.assert_close(difference.detach(), (b @ a) * 4.0, atol=1e-6, rtol=0)  # alpha 16 / rank 4
    assert float(b.abs().max()) > 0
    # the model is scored on its rows, and on what it was pretrained on
    old = base_run.parent / "shards" / "validation"
    found = evaluate_run(EvaluateConfig(run_dir=tmp_path / "whole", shards={"old": old, "rows": rows / "validation"}))
    logged = read_metrics(tmp_path / "whole").of_kind("evaluate")[-1]
    assert found.sources["rows"].loss == pytest.approx(logged["loss"], abs=1e-5)
    targets = np.concatenate([s.targets[s.targets != IGNORE] for s in windows(rows / "validation")])
    assert found.sources["rows"].tokens == len(targets)
    shares = np.unique(targets, return_counts=True)[1] / len(targets)
    assert found.unigram_entropies["rows"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert found.sources["old"].tokens == TokenDataset(old, seq_len=96).num_tokens - 1
    with pytest.raises(UserError, match="its samples have 96"):
        evaluate_run(EvaluateConfig(run_dir=base_run, shards={"rows": rows / "validation"}, max_samples=1))
    with pytest.raises(UserError, match="holds the whole model already"):
        merge(tmp_path / "merged", tmp_path / "again")
    refused = start(project, tmp_path / "d", {**values, "tune": {"freeze_blocks": 1}}, 1)
    assert refused.wait() == [EXIT_USER_ERROR]
    assert "the checkpoint holds other weights than would be trained" in refused.output()
    again = start(project, tmp_path / "e", {**values, "run_dir": str(tmp_path / "f"), "init_from": str(tmp_path / "whole")}, 1)
    assert again.wait() == [EXIT_USER_ERROR]
    assert "merge=true output_dir=" in again.output()


@pytest.mark.slow
def test_a_killed_run_that_resumes_gives_the_same_weights(base_run: Path, rows: Path, project: Path, tmp_path: Path) -> None:
    values = tuned(rows, tmp_path / "whole", base_run, tune={"freeze_blocks": 1}, engine={"kind": "fsdp"})
    values |= {"save_every_steps": 2, "determinism": "strict"}
    assert start(project, tmp_path / "a", values, 1).wait() == [EXIT_DONE]
    stop = start(project, tmp_path / "c", {**values, "run_dir": str(tmp_path / "cut")}, 1)
    wait_until(lambda: len(list_checkpoints(tmp_path / "cut")) > 0)
    stop.kill()
    assert start(project, tmp_path / "c", {**values, "run_dir": str(tmp_path / "cut")}, 1).wait() == [EXIT_DONE]
    one, two = (load_model(tmp_path / name).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    record = read_state(list_checkpoints(tmp_path / "cut")[-1])["base"]
    assert base_path(record, tmp_path) == list_checkpoints(base_run)[-1]
    with pytest.raises(UserError, match="its manifest is another one"):
        base_path({**record, "manifest_sha256": "0"}, tmp_path)
    with pytest.raises(UserError, match="which is gone; init_from=RUN"):
        base_path({**record, "path": str(tmp_path / "x")}, tmp_path)


def test_patience_is_used_up_by_evaluations_without_a_lower_loss() -> None:
    assert not used_up([3.0, 2.0, 2.5], 2)
    assert used_up([3.0, 2.0, 2.5, 2.0], 2)
    assert not used_up([3.0, 2.0, 2.5, 1.9], 2)
    assert not used_up([3.0, 2.0], 2)
    assert not used_up([1.0, 2.0, 3.0], 0)
    assert used_up([1.0, float("inf"), float("inf")], 2)


@pytest.mark.slow
def test_a_run_whose_validation_loss_rises_is_done_early(base_run: Path, rows: Path, project: Path, tmp_path: Path) -> None:
    values = tuned(rows, tmp_path / "run", base_run, evaluate_every_steps=1, early_stop_evaluations=2, save_every_steps=1)
    values |= {"max_steps": 60, "optim": {"lr": 0.5, "max_grad_norm": 0, "schedule": {"kind": "constant"}}}
    ranks = start(project, tmp_path, values, 1)
    assert ranks.wait() == [EXIT_DONE], ranks.output()
    metrics = read_metrics(tmp_path / "run")
    found = [row["loss"] for row in metrics.of_kind("evaluate")]
    [done] = metrics.of_kind("done")
    assert done["early_stop"] == 2
    assert len(found) == done["step"] < 60
    assert used_up(found, 2)
    assert not used_up(found[:-1], 2)
    best = read_json(tmp_path / "run" / "checkpoints" / "best.json")
    assert best["validation_loss"] == min(found)
    again = start(project, tmp_path, values, 1)  # it is done, and stays so
    assert again.wait() == [EXIT_DONE], again.output()
    assert len(read_metrics(tmp_path / "run").of_kind("evaluate")) == len(found)


def test_settings_of_tuning_that_do_not_fit(rows: Path, base_run: Path, tmp_path: Path) -> None:
    values = tuned(rows, tmp_path, base_run, tune={"freeze_blocks": 1})
    for changes, match in (
        ({"init_from": None}, "it needs init_from"),
        ({"determinism": "canonical"}, "canonical is not covered"),
        ({"early_stop_evaluations": 1, "evaluate_every_steps": 0}, "early_stop_evaluations=1 needs evaluate_every_steps"),
        ({"tune": {"lora": {}, "freeze_blocks": 1}}, "freeze and freeze_blocks beside lora"),
    ):
        with pytest.raises(UserError, match=match):
            validate(TrainConfig, {**values, **changes}, source="test")
