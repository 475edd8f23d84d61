"""Metrics lines, the stopwatch and its ledger, throughput and MFU, and W&B files over a restart."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config import UserError
from megagpt.model.flops import flops_per_token, peak_flops
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.monitor.config import MonitorConfig
from megagpt.monitor.goodput import Stopwatch, goodput_ledger
from megagpt.monitor.metrics import METRICS_FILE, Metrics, Row, format_row, read_metrics, superseded
from megagpt.monitor.monitor import Monitor
from megagpt.monitor.nvml import open_gpu
from megagpt.monitor.wandb_files import Missing, missing_rows, records

SMALL = {"vocab_size": 192, "seq_len": 48, "num_layers": 3, "num_heads": 4, "hidden_size": 64}


class Seconds:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def open_monitor(run_dir: Path, *, rank: int = 0, clock: Stopwatch | None = None, **options: Any) -> Monitor:
    config = options.pop("config", MonitorConfig())
    monitor = Monitor(run_dir, config, run_config={"seed": 1}, rank=rank, **options)
    if clock is not None:
        monitor.clock = clock
    return monitor


# FLOPs and peaks


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_flops_per_token_equal_what_torch_counts(family: str, checkpoint_every: int, kv_heads: int) -> None:
    config = ModelConfig.model_validate({**SMALL, "family": family, "num_kv_heads": kv_heads, "tied_head": kv_heads == 1})
    with torch.device("meta"):
        model = GPT(config, checkpoint_every=checkpoint_every)
        ids = torch.zeros(2, config.seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    flops = flops_per_token(config, checkpoint_every=checkpoint_every)
    assert counter.get_total_flops() / ids.numel() == flops.hardware
    assert (flops.hardware > flops.full) == (checkpoint_every > 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_selective_checkpointing_repeats_nothing_that_is_counted(family: str, kv_heads: int) -> None:
    config = ModelConfig.model_validate({**SMALL, "family": family, "num_kv_heads": kv_heads})
    with FakeTensorMode():  # unlike meta, it runs attention as the one kernel that is kept
        model, ids = (
            GPT(config, checkpoint_every=1, checkpoint_selectively=True),
            torch.zeros(2, config.seq_len, dtype=torch.long),
        )
        with FlopCounterMode(display=False) as counter:
            model(ids, ids).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    flops = flops_per_token(config, checkpoint_every=1, checkpoint_selectively=True)
    attention = 3 * config.num_layers * 4 * config.seq_len * config.hidden_size
    assert products / ids.numel() == flops.hardware - attention
    assert flops.hardware == flops.full < flops_per_token(config, checkpoint_every=1).hardware


def test_flops_of_gpt2_small_by_hand() -> None:
    config = ModelConfig(family="gpt2", vocab_size=50304, seq_len=1024, num_layers=12, num_heads=12, hidden_size=768)
    flops = flops_per_token(config)
    weights = 12 * 12 * 768**2 + 50304 * 768
    assert flops.full == 6 * weights + 12 * 12 * 768 * 1024
    assert flops.causal == 6 * weights + 12 * 12 * 768 * 1025 / 2


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
    ],
)
def test_peak_of_known_gpus(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize("name", ["cpu", "NVIDIA H300", "NVIDIA H200 MIG 1g.18gb", "Tesla V100-SXM2-32GB", ""])
def test_no_peak_for_unknown_devices(name: str) -> None:
    assert peak_flops(name) is None


# The stopwatch and the ledger


def test_stopwatch_charges_the_innermost_activity_and_sums_to_the_wall_time() -> None:
    now = Seconds()
    clock = Stopwatch(already={"start": 3.0}, now=now)
    now.now += 1
    with clock("train"):
        now.now += 10
        with clock("data_wait"):
            now.now += 2
        now.now += 5
    with contextlib.suppress(ValueError), clock("save"):
        now.now += 4
        raise ValueError("a save that fails is charged all the same")
    now.now += 0.5
    assert clock.seconds() == {"start": 3.0, "other": 1.5, "train": 15.0, "data_wait": 2.0, "save": 4.0}
    with clock("train"):
        now.now += 1
        assert clock.seconds()["train"] == 16.0


def row(kind: str, step: int, attempt: int, when: float = 0.0, **values: Any) -> Row:
    return {"kind": kind, "step": step, "time": when, "incarnation": attempt, **values}


def test_ledger_over_a_restart_sums_to_the_wall_time() -> None:
    rows = (
        row("start", 0, 1, 10.0, seconds={"start": 10.0}),
        row("train", 10, 1, 30.0, seconds={"start": 10.0, "train": 20.0}),
        row("train", 20, 1, 55.0, seconds={"start": 10.0, "train": 40.0, "save": 5.0}),
        row("start", 10, 2, 70.0, seconds={"start": 8.0}),
        row("train", 20, 2, 95.0, seconds={"start": 8.0, "train": 25.0}),
    )
    ledger = goodput_ledger(Metrics(rows=(), all_rows=rows, torn_lines=0))
    assert ledger.seconds == {"start": 18.0, "train": 45.0, "save": 5.0, "down": 7.0, "repeated": 20.0}
    assert ledger.wall_seconds == 95.0
    assert ledger.goodput == pytest.approx(45 / 95)


# metrics.jsonl


def test_rows_are_read_back_as_written(tmp_path: Path) -> None:
    monitor = open_monitor(tmp_path)
    monitor.log("start", 0, tokens=0)
    monitor.log("train", 1, loss=torch.tensor(2.5), grad_norm=float("nan"), lr=1e-3, tokens=64)
    monitor.log("evaluate", 1, loss=float("inf"), sources={"wiki": {"loss": torch.tensor(1.5, dtype=torch.float64)}})
    monitor.close()
    start, train, evaluate = read_metrics(tmp_path).rows
    assert (start["kind"], start["step"], start["incarnation"], start["device_name"]) == ("start", 0, 1, "cpu")
    assert (train["loss"], train["lr"], train["tokens"]) == (2.5, 1e-3, 64)
    assert train["grad_norm"] != train["grad_norm"]
    assert (evaluate["loss"], evaluate["sources"]) == (float("inf"), {"wiki": {"loss": 1.5}})
    assert sum(train["seconds"].values()) > 0
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["grad_norm"] == "NaN"


def test_a_torn_last_line_is_healed_and_counted(tmp_path: Path) -> None:
    for attempt in (1, 2):
        monitor = open_monitor(tmp_path)
        monitor.log("start", 0)
        monitor.log("train", attempt, loss=1.0)
        monitor.close()
        if attempt == 1:
            path = tmp_path / METRICS_FILE
            path.write_bytes(path.read_bytes()[:-9])
    metrics = read_metrics(tmp_path)
    assert [(r["kind"], r["step"], r["incarnation"]) for r in metrics.all_rows] == [
        ("start", 0, 1),
        ("start", 0, 2),
        ("train", 2, 2),
    ]
    assert metrics.torn_lines == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "3"},
        {"step": None},
        {"incarnation": "1"},
        {"incarnation": True},
        {"time": "now"},
        {"kind": 3},
        {"incarnation": 9},
    ],
)
def test_a_row_of_wrong_type_or_of_no_start_hides_nothing(tmp_path: Path, damage: dict[str, Any]) -> None:
    path, row = tmp_path / METRICS_FILE, {"kind": "start", "step": 0, "time": 1.0, "incarnation": 1}
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "0002.claim").touch()
    rows = [row, {**row, **damage}, {**row, "kind": "train", "step": 1}, {**row, "incarnation": 2, "step": 1}]
    path.write_text("".join(json.dumps(value) + "\n" for value in rows))
    metrics = read_metrics(tmp_path)
    assert [(value["kind"], value["step"]) for value in metrics.rows] == [("start", 0), ("train", 1), ("start", 1)]
    assert metrics.torn_lines == 1


@pytest.mark.parametrize("damage", [b'{"kind":"train"}\n', b"\x00\x00\x00\n", b"\xff\xfe\n", b"[1]\n"])
def test_lines_that_are_no_rows_are_counted(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / METRICS_FILE).write_bytes(damage)
    assert read_metrics(tmp_path) == Metrics((), (), 1)


def test_no_metrics_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


def test_superseded_rows() -> None:
    rows = [
        (row("start", 0, 1), False),
        (row("train", 10, 1), False),
        (row("evaluate", 10, 1), True),  # done again by the second start
        (row("train", 20, 1), True),
        (row("stop", 20, 1), False),
        (row("start", 10, 2), False),
        (row("evaluate", 10, 2), False),
        (row("evaluate", 15, 1), True),  # a left-over process of the first start
        (row("train", 20, 2), False),
        (row("train", 30, 2), True),
        (row("rewind", 20, 2), False),
        (row("train", 30, 2), False),
    ]
    assert superseded([r for r, _ in rows]) == [expected for _, expected in rows]


def test_only_rank_0_writes_and_no_value_is_fetched_elsewhere(tmp_path: Path) -> None:
    class Device:
        def __float__(self) -> float:
            raise AssertionError("fetched from the device")

    monitor = open_monitor(tmp_path, rank=1)
    monitor.log("train", 1, loss=Device())
    monitor.close()
    assert list(tmp_path.iterdir()) == []
    assert [step for step in range(1, 31) if monitor.due(step)] == [10, 20, 30]


# Throughput and MFU


@pytest.mark.parametrize(("peak_tflops", "devices"), [(None, 1), (0.001, 1), (0.001, 4)])
def test_throughput_leaves_out_pauses(tmp_path: Path, peak_tflops: float | None, devices: int) -> None:
    now = Seconds()
    flops = flops_per_token(ModelConfig.model_validate(SMALL))
    config = MonitorConfig(peak_tflops=peak_tflops)
    monitor = open_monitor(tmp_path, clock=Stopwatch(now=now), config=config, flops=flops, num_devices=devices)
    monitor.log("start", 0, tokens=0)
    now.now += 4
    monitor.log("train", 10, tokens=1000)
    now.now += 1.5
    with monitor.clock("evaluate"):
        now.now += 7
    monitor.log("evaluate", 10, loss=1.0, tokens=1000)
    now.now += 0.5
    monitor.log("train", 20, tokens=2000)
    monitor.close()
    first, second = read_metrics(tmp_path).of_kind("train")
    assert (first["tokens_per_second"], second["tokens_per_second"]) == (250.0, 500.0)
    if peak_tflops is None:
        assert "mfu" not in second
    else:
        assert second["mfu"] == pytest.approx(500 / devices * flops.full / 1e9)
        assert second["mfu_causal"] == pytest.approx(500 / devices * flops.causal / 1e9)
    assert second.get("tokens_per_second_per_device") == (125.0 if devices == 4 else None)


def test_console_lines_hold_the_keys_of_the_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = open_monitor(tmp_path, max_steps=200)
    with caplog.at_level("INFO", logger="megagpt"):
        monitor.log("train", 100, loss=3.21987, lr=3e-4, tokens=1_250_000, gpu={"power_watts": 1})
    monitor.close()
    assert caplog.messages == ["train 100/200  loss 3.22  lr 3.00e-04  tokens 1.2M"]


def test_texts_of_several_lines_go_below_the_console_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = open_monitor(tmp_path)
    with caplog.at_level("INFO", logger="megagpt"):
        monitor.log("sample", 5, prompt="\n", text="To be,\nor not", score=1)
    monitor.close()
    assert caplog.messages == ["sample 5  prompt '\\n'  score 1\n  | To be,\n  | or not"]


def test_readings_without_a_gpu_are_none(caplog: pytest.LogCaptureFixture) -> None:
    assert open_gpu(torch.device("cpu")) is None
    assert caplog.messages == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and NVML with it")
def test_missing_nvml_is_said_once_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    assert open_gpu(torch.device("cuda", 0)) is None
    assert [message[:16] for message in caplog.messages] == ["no GPU readings:"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_readings(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    monitor = open_monitor(tmp_path, device=device)
    monitor.log("train", 10, loss=1.0)
    monitor.close()
    (train,) = read_metrics(tmp_path).rows
    assert train["gpu"]["power_watts"] > 0
    assert train["gpu"]["memory_used_gib"] > 0


# W&B

WANDB_PROCESS = """
import signal, sys
from pathlib import Path
from megagpt.monitor.config import MonitorConfig
from megagpt.monitor.monitor import Monitor
first, last, kill = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "kill"
config = MonitorConfig(wandb="offline", wandb_project="test", log_every_steps=10)
monitor = Monitor(Path(sys.argv[1]), config, run_config={"seed": 7, "model": {"num_layers": 2}}, rank=0)
monitor.log("start", first, tokens=0)
for step in range(first + 10, last + 1, 10):
    monitor.log("train", step, loss=1 / step, tokens=step)
    monitor.log("evaluate", step, loss=2 / step, sources={"wiki": {"loss": 3.0}})
if kill:
    print("ready", flush=True)
    signal.pause()
monitor.close()
"""


def without_wandb(home: Path, **more: str) -> dict[str, str]:
    """An environment in which W&B knows no account, whatever the machine's user has set up."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    return {**kept, "HOME": str(home), "NETRC": str(home / "none"), **more}


@pytest.mark.parametrize("end_of_first", ["end", pytest.param("kill", marks=pytest.mark.slow)])
def test_wandb_continues_one_run_over_a_restart(tmp_path: Path, end_of_first: str) -> None:
    words = [sys.executable, "-W", "error", "-c", WANDB_PROCESS, str(tmp_path / "run")]
    environment = without_wandb(tmp_path)
    with subprocess.Popen([*words, "0", "50", end_of_first], env=environment, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == ("ready\n" if end_of_first == "kill" else "")
            wait_until_on_disk(tmp_path / "run", step=40)
        finally:
            first.kill()
    subprocess.run([*words, "20", "100", "end"], env=environment, check=True, timeout=900)

    ids, steps, losses = set(), [], {}
    for path in wandb_files(tmp_path / "run"):
        run_id, config, history = read_wandb_file(path)
        ids.add(run_id)
        assert config["seed"] == 7
        assert config["model"] == {"num_layers": 2}
        for step, values in history:
            steps.append(step)
            losses[step] = values.get("train/loss")
            assert step == 0 or values["evaluate/sources/wiki/loss"] == 3.0
    assert ids == {json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]}
    assert all(before < after for before, after in itertools.pairwise(steps)), steps
    assert steps == [0, *range(10, 101, 10)]
    assert losses[100] == 0.01


@pytest.mark.slow
def test_what_a_lost_node_had_not_written_is_sent_again_once(tmp_path: Path) -> None:
    """Twice a start and W&B's process are killed, the second time before anything is on the disk; then a start ends well."""
    words = [sys.executable, "-W", "error", "-c", WANDB_PROCESS, str(tmp_path / "run")]
    environment = without_wandb(tmp_path)
    for first, last, on_disk in (("0", "50", 10), ("20", "100", None)):
        with subprocess.Popen([*words, first, last, "kill"], env=environment, stdout=subprocess.PIPE, text=True) as lost:
            assert lost.stdout is not None
            assert lost.stdout.readline() == "ready\n"
            if on_disk is not None:
                wait_until_on_disk(tmp_path / "run", step=on_disk)
            for process in (*descendants(lost.pid), lost.pid):
                os.kill(process, signal.SIGKILL)
    subprocess.run([*words, "60", "150", "end"], env=environment, check=True, timeout=900)
    found = [item for path in wandb_files(tmp_path / "run") for item in read_wandb_file(path)[2]]
    assert [step for step, _ in found] == [0, *range(10, 151, 10)]
    for step, values in found[1:]:
        assert (values["train/loss"], values["evaluate/loss"], values["train/tokens"]) == (1 / step, 2 / step, step)
        assert values["evaluate/sources/wiki/loss"] == 3.0
        assert "train/seconds/start" in values


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "stat").read_text().rpartition(") ")[2].split()[1] == str(process):
                found += [int(folder.name), *descendants(int(folder.name))]
    return found


def test_which_rows_wandb_lacks(tmp_path: Path) -> None:
    """A start without a file (synced and cleaned, or of an older version) lacks nothing; online the server tells."""
    facts = [{"mode": "online", "folder": "run-1"}, {"mode": "offline", "folder": "gone"}, {"mode": "offline"}]
    rows = []
    for number, wandb in enumerate(facts, start=1):
        rows.append(row("start", 10 * number, number, wandb=wandb))
        rows += [row("train", 10 * number + step, number, loss=1.0) for step in (1, 2, 3)]
    rows.append(row("start", 40, 4))
    rows.append(row("train", 41, 4))
    earlier = Metrics(tuple(rows), tuple(rows), 0)
    assert missing_rows(earlier, tmp_path) == Missing((), 33)
    assert [item["step"] for item in missing_rows(earlier, tmp_path, server_step=11).rows] == [12, 13]


def test_rows_that_a_rewind_took_back_are_not_sent_again(tmp_path: Path) -> None:
    """The server has step 0 only: of what is missing the rows that still hold are sent."""
    wandb = {"mode": "online", "folder": "run-1"}
    rows = [row("start", 0, 1, wandb=wandb), *(row("train", step, 1, loss=9.0) for step in (1, 2, 3))]
    rows += [row("rewind", 1, 1, bad_step=3), *(row("train", step, 1, loss=1.0) for step in (2, 3))]
    (tmp_path / METRICS_FILE).write_bytes(b"".join(map(format_row, rows)))
    found = missing_rows(read_metrics(tmp_path), tmp_path, server_step=0).rows
    assert [(item["step"], item.get("loss")) for item in found if item["kind"] == "train"] == [(1, 9.0), (2, 1.0), (3, 1.0)]


@pytest.mark.parametrize("damage", [b"", b":W&B", b"\0" * 100, b":W&Babc" + b"\xff" * 50_000])
def test_a_damaged_wandb_file_ends_where_it_is_damaged(damage: bytes) -> None:
    assert list(records(damage)) == []


@pytest.mark.slow
def test_wandb_online_out_of_reach_goes_on_offline(tmp_path: Path) -> None:
    code = WANDB_PROCESS.replace('wandb="offline"', 'wandb="online", wandb_init_seconds=3')
    environment = without_wandb(tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    words = [sys.executable, "-c", code, str(tmp_path / "run"), "0", "20", "end"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "W&B cannot be reached" in done.stderr
    assert read_metrics(tmp_path / "run").rows[0]["wandb"]["mode"] == "offline"
    (path,) = wandb_files(tmp_path / "run")
    assert [step for step, _ in read_wandb_file(path)[2]] == [0, 10, 20]


def test_wandb_online_without_credentials_is_an_error_at_once(tmp_path: Path) -> None:
    code = WANDB_PROCESS.replace('wandb="offline"', 'wandb="online"')
    words = [sys.executable, "-c", code, str(tmp_path / "run"), "0", "20", "end"]
    done = subprocess.run(words, env=without_wandb(tmp_path), capture_output=True, text=True, timeout=900)
    assert done.returncode != 0
    assert "UserError: wandb=online: no credentials (set WANDB_API_KEY" in done.stderr
    assert not (tmp_path / "run" / METRICS_FILE).exists()


def wandb_files(run_dir: Path) -> list[Path]:
    """The .wandb files of the offline runs below a run directory, oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def wait_until_on_disk(run_dir: Path, *, step: int) -> None:
    """W&B writes from a process of its own, about every 20 s: wait until it has written a step."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if any(seen >= step for path in wandb_files(run_dir) for seen, _ in read_wandb_file(path)[2]):
            return
        time.sleep(0.05)
    pytest.fail(f"W&B did not write step {step} in 120 s")


def read_wandb_file(path: Path) -> tuple[str, dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    """Run id, config and (step, values) of each history record of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    run_id, config, history = "", {}, []
    for payload in records(path.read_bytes()):
        record = Record.FromString(payload)
        if record.WhichOneof("record_type") == "run":
            run_id = record.run.run_id
            config |= {update.key: json.loads(update.value_json) for update in record.run.config.update if update.key}
        elif record.WhichOneof("record_type") == "history":
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append((record.history.step.num or values.get("_step", 0), values))
    return run_id, config, history
