"""docs/benchmarks.md is what the results give, its tables say what the numbers are, and bench/gpu/run.py runs without a GPU."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parent.parent
BENCH = PROJECT / "bench"


def run(*words: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_the_page_is_what_the_results_give() -> None:
    done = run("-m", "bench.document", "check=true")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def document():
    from bench import document

    return document


def test_cells_show_medians_units_and_what_is_missing(document) -> None:
    spread = {"median": 0.51234, "min": 0.5, "max": 0.6}
    rows = [{"contender": "a|b", "step_cpu_s": spread}, {"contender": "c", "tokens": 12345}]
    assert document.table(rows).splitlines() == [
        "| contender | step cpu s | tokens |",
        "| --- | ---: | ---: |",
        "| a\\|b | 0.512 (0.5 to 0.6) | – |",
        "| c | – | 12,345 |",
    ]


def test_a_result_without_rows_is_shown_by_its_values(document) -> None:
    tables = document.tables_of({"name": "x", "results": {"about": "", "kills": {"torn": 3, "runs": [1, 2]}, "bitwise": True}})
    assert tables == [{"title": "", "rows": [{"name": "kills.torn", "value": 3}, {"name": "bitwise", "value": True}]}]


def test_every_result_says_when_where_and_how_it_was_measured() -> None:
    for path in (BENCH / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"name", "date", "command", "machine", "versions", "results"} <= result.keys(), path
        assert result["command"].startswith(("python bench/", "python -m bench.", "python tests/soak/")), path


def test_slopes_are_those_of_one_call_only() -> None:
    from bench import scale

    earlier = [
        {"documents": 10, "open_cpu_s": 9.0, "open_slope": None},
        {"documents": 1000, "open_cpu_s": 9.0, "open_slope": 1.0, "measured": "before"},
        {"documents": 10000, "open_cpu_s": 90.0, "open_slope": 2.0, "measured": "before"},
    ]
    now = [{"documents": size, "open_cpu_s": size / 100, "measured": "now"} for size in (10, 100)]
    rows = scale.with_slopes(scale.with_earlier(now, earlier, "documents"), "documents")
    assert [(row["documents"], row["measured"]) for row in rows] == [
        (10, "now"),
        (100, "now"),
        (1000, "before"),
        (10000, "before"),
    ]
    assert [row["open_slope"] for row in rows] == [None, pytest.approx(1.0), None, pytest.approx(1.0)]
    older = [{"documents": 1000, "open_cpu_s": 9.0}]  # of a file that did not say when
    assert scale.with_slopes(scale.with_earlier(now, older, "documents"), "documents")[2]["open_slope"] is None


def test_where_one_constant_mfu_errs_less_is_said() -> None:
    from bench.plan import speed

    row = {"gpu": "h200", "runs": 2, "median_error_pct": 4.0, "constant_median_error_pct": 2.4}
    row |= {"worst_error_pct": 4.1, "constant_worst_error_pct": 5.0}
    assert speed.won_by_the_constant([{"rows": [row]}]) == ["h200: median 4.0 % (one constant MFU: 2.4 %)"]


def test_a_memory_bench_that_resumes_knows_what_it_has_measured() -> None:
    from bench.plan import memory

    cells = memory.make_cells(6)
    results = [{**cells[4], "measured": {"start": 4}, "error": 0.0}, {**cells[1], "ranks": 9, "measured": {"start": 1}}]
    assert memory.measured_before(cells, results) == {4: {"start": 4}}


def test_what_grows_faster_than_linearly_is_said() -> None:
    from bench import scale

    rows = [
        {"documents": 10, "sort_cpu_s": 90.0, "measured": "before"},  # of another call: in no slope
        {"documents": 100, "sort_cpu_s": 1.0, "measured": "now"},
        {"documents": 1000, "sort_cpu_s": 10.0, "measured": "now"},
        {"documents": 10000, "sort_cpu_s": 1000.0, "measured": "now"},
    ]
    table = {"key": "x", "title": "Sorting", "rows": scale.with_slopes(rows, "documents")}
    said = "Above linear in Sorting: sort 2.00 up to 10,000 documents (1.50 over all). One run of each size, on shared cores."
    assert scale.explanation([table]) == said
    flat = {**table, "rows": scale.with_slopes(rows[:3], "documents")}
    assert scale.explanation([flat]) == ""


def test_what_a_peer_or_the_bare_loop_wins_is_said() -> None:
    from bench.training import compare as training

    ratios = {"bare torch loop": 1.0, "megagpt, fsdp": 0.9, "megagpt, deepspeed ZeRO-1": 1.2, "Lightning": 1.1, "litgpt": 1.3}
    rows = [{"contender": name, "ratio_to_bare_loop": {"median": ratio}} for name, ratio in ratios.items()]
    said = "megagpt, deepspeed ZeRO-1 takes 20.0% more than bare torch loop, 9.1% more than Lightning."
    assert training.losses_explained(rows) == said


def test_programs_take_turns_and_one_that_fails_costs_only_its_own_row(tmp_path: Path) -> None:
    from bench.training.turns import Contender, run_turn_about

    ready = "import json, os; open(os.environ['BENCH_READY'], 'w').write(json.dumps({'cpu_s': 0.5, 'at': 0.0}));"
    good = ready + "open(os.environ['BENCH_OUT'], 'w').write(json.dumps({'step_ends_cpu_s': [1.0, 1.5, 2.5]}))"
    programs = {"good": good, "bad": ready + "raise SystemExit('no such thing')"}
    contenders = [Contender(name, [sys.executable, "-c", code], ranks=2) for name, code in programs.items()]
    outcomes, failures = run_turn_about(contenders, tmp_path)
    assert list(outcomes) == ["good"]
    assert outcomes["good"].step_cpu_s() == [1.0, 2.0]  # of both ranks
    assert list(failures) == ["bad"]
    assert "exit status 1" in failures["bad"]
    assert "no such thing" in failures["bad"]


def test_a_command_is_charged_with_its_own_memory_and_time() -> None:
    """A parent of 300 MB must not be seen in its child's peak."""
    from bench.measure import run_once

    ours = bytearray(b"x") * 300_000_000
    small = run_once([sys.executable, "-c", "print('{\"found\": 1}')"])
    large = run_once([sys.executable, "-c", "a = bytearray(b'x') * 200_000_000"])
    assert len(ours) > small.peak_rss_bytes * 2
    assert 200_000_000 < large.peak_rss_bytes < len(ours)
    assert small.output == {"found": 1}
    assert 0 < small.cpu_s < small.wall_s + 1
    with pytest.raises(SystemExit, match=r"exit status 7 after(.|\n)*no such thing"):
        run_once([sys.executable, "-c", "import sys; print('no such thing'); sys.exit(7)"])


def test_a_command_is_charged_with_what_it_leaves_behind() -> None:
    from bench.measure import run_once

    busy = "import time\nwhile time.process_time() < 0.5: pass"
    leaves = f"import subprocess, sys; subprocess.Popen([sys.executable, '-Sc', {busy!r}])"
    assert run_once([sys.executable, "-Sc", leaves]).cpu_s > 0.5


def test_every_benchmark_can_be_started_as_a_module() -> None:
    """Peers apart: they need the packages of others."""
    paths = [path for path in sorted(BENCH.rglob("*.py")) if "peers" not in path.parts]
    names = [".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in paths]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = run("-c", code, *names)
    assert done.returncode == 0, done.stderr


def test_what_a_peer_wins_in_fine_tuning_is_said() -> None:
    from bench.finetune import compare
    from bench.training.turns import Outcome

    def outcome(step_s: float, losses: list[float], peak_mib: int) -> Outcome:
        rank = {"step_ends_cpu_s": [1.0, 1.0 + step_s, 1.0 + 2 * step_s], "losses": losses, "imported_rss_bytes": 100 << 20}
        return Outcome(1.0, 1.0, ({**rank, "peak_rss_bytes": peak_mib << 20},))

    outcomes = {"megagpt": [outcome(0.5, [3.0, 2.0], 400)], "litgpt": [outcome(0.4, [3.0, 2.25], 500)]}
    outcomes["peft"] = [outcome(0.75, [3.0, 2.0], 300)]
    rows = [compare.row_of(name, outcomes) for name in outcomes]
    assert [row["largest_loss_difference_to_megagpt"] for row in rows] == [0.0, 0.25, 0.0]
    assert [row["memory_over_import_mib"] for row in rows] == [300.0, 400.0, 200.0]
    said = compare.lost([{"title": "LoRA", "rows": rows}, {"title": "LoRA: loss", "rows": [{"step": "1"}]}])
    assert said == "LoRA: litgpt takes 20.0 % less CPU time per step. LoRA: peft has a peak 100 MiB lower."
    with pytest.raises(SystemExit, match="litgpt: 1 losses, ours 2"):
        compare.row_of("litgpt", {**outcomes, "litgpt": [outcome(0.4, [3.0], 500)]})


def test_runs_of_a_classifier_are_summed_up_by_what_they_began_with() -> None:
    from bench.finetune import classify

    run = {"model": "base", "rows": "scarce", "f1_negative": 0.5, "f1_positive": 0.7}
    runs = [{**run, "pretrained": True, "accuracy": accuracy} for accuracy in (0.6, 0.8)]
    runs += [{**run, "pretrained": False, "accuracy": 0.5}, {**run, "rows": "all", "pretrained": True, "accuracy": 0.9}]
    found = classify.summary(runs, "base", "scarce", True)
    assert (found["runs"], found["weights"], found["training_rows"]) == (2, "pretrained", "301")
    assert found["accuracy"] == {"median": pytest.approx(0.7), "min": 0.6, "max": 0.8}
    assert classify.summary(runs, "base", "scarce", False)["accuracy"]["max"] == 0.5


def test_the_dialogues_for_summaries_are_rows_of_samsums_format() -> None:
    rows = [json.loads(line) for line in (BENCH / "finetune" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len({row["summary"] for row in rows}) == len(rows) == 64
    for row in rows:
        speakers = {line.partition(": ")[0] for line in row["dialogue"].split("\r\n")}
        assert len(speakers) == 2, row
        assert any(name in row["summary"] for name in speakers), row


def test_weights_after_a_kill_are_compared_by_their_bytes(tmp_path: Path) -> None:
    from bench.finetune import tasks

    for name, digest, step in (("a", "1" * 64, 60), ("b", "1" * 64, 60), ("c", "2" * 64, 60), ("d", "1" * 64, 50)):
        folder = tmp_path / name / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        files = {"pieces_00000.safetensors": {"size": 1, "sha256": digest}, "state.json": {"size": 1, "sha256": name * 64}}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
    equal = {name: tasks.compare_weights(tmp_path / "a", tmp_path / name)["weights_equal"] for name in "bcd"}
    assert equal == {"b": True, "c": False, "d": False}


@pytest.mark.slow
def test_the_fine_tuning_benchmark_runs_without_peers(tmp_path: Path) -> None:
    """A tiny model goes to transformers' format and back, and is tuned with adapters and as a whole."""
    done = run("-m", "bench.finetune.compare", f"work_dir={tmp_path}", "short=true", timeout=900)
    assert done.returncode == 0, done.stderr
    losses = [[float(line.split(": ")[1].strip(",")) for line in done.stdout.splitlines() if f'"{key}_loss"' in line]
              for key in ("first", "last")]  # fmt: skip
    assert len(losses[0]) == 2
    assert losses[0][0] == losses[0][1]  # B is zero: adapters begin with what the model gives
    assert all(last < first for first, last in zip(*losses, strict=True)), losses


@pytest.fixture
def gpu_benchmark():
    from bench.gpu import run

    return run


def test_a_shape_that_a_card_cannot_hold_is_not_run(gpu_benchmark) -> None:
    shapes = gpu_benchmark.TIMINGS
    assert "the card has 80 GiB" in gpu_benchmark.too_large(shapes["8b"], 80 * 2**30)
    assert [name for name, shape in shapes.items() if gpu_benchmark.too_large(shape, 139 * 2**30)] == []


def test_steps_on_a_gpu_are_timed_by_the_device(gpu_benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches take 20 ms of the host, steps 250 ms of the device."""
    from bench.training import clock

    events: list[Any] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append(self)

        def elapsed_time(self, other: "Event") -> float:
            return 250.0 * (events.index(other) - events.index(self))

    hooks: list[Any] = []
    monkeypatch.setattr(clock, "register_optimizer_step_post_hook", hooks.append)
    monkeypatch.setattr(clock.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(clock.torch.cuda, "Event", Event)
    monkeypatch.setattr(clock.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(clock.torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(clock.time, "perf_counter", itertools.count(0.0, 0.02).__next__)
    monkeypatch.setenv("BENCH_READY", str(tmp_path / "ready"))
    monkeypatch.setenv("BENCH_OUT", str(tmp_path / "out.json"))
    marks = clock.Clock()
    for _ in range(20):
        hooks[0]()
    marks.write(20, [1.0])
    outcome = json.loads((tmp_path / "out.json").read_text()) | {"first_step_after_s": 1.0}
    timing = gpu_benchmark.TIMINGS["124m"]
    row = gpu_benchmark.row_of("124m", timing, "nanogpt", outcome, 600.0)
    assert row["tokens_per_s"] == pytest.approx(timing.seq_len * timing.micro_batch_size / 0.25)


GPU_PHASES = ("check", "matmul", "trace_124m", "fp8", "generation")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_tiny_shapes(tmp_path: Path) -> None:
    done = run("-m", "bench.gpu.run", f"out={tmp_path}", "dry=true", f"phases={','.join(GPU_PHASES)}", "only=fsdp,fsdp_rowwise")
    assert done.returncode == 0, done.stderr
    check, _, traced, fp8, generation = (json.loads((tmp_path / f"{phase}.json").read_text()) for phase in GPU_PHASES)
    assert check["not_run"] == {}
    assert [row["good"] for row in check["rows"]] == [True] * 2, check["rows"]
    assert traced["not_run"] == {}
    assert [row["contender"] for row in traced["rows"]] == ["fsdp"]
    assert traced["runs"]["fsdp"]["trace"]["seconds_by_kind"]["matrix products"] > 0
    assert fp8["not_run"] == {}
    plain, rowwise = (fp8["runs"][name]["losses"] for name in ("fsdp", "fsdp_rowwise"))
    assert 0 < abs(plain[-1] - rowwise[-1]) < 0.05, (plain, rowwise)
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if not missing:
        assert generation["not_run"] == {}
        assert [row["share_of_equal_ids"] > 0.5 for row in generation["rows"]] == [True], generation
    else:
        assert generation["not_run"] == {"transformers": f"not installed: {', '.join(missing)}"}
    refused = run("-m", "bench.gpu.run", f"collect={tmp_path}")
    assert refused.returncode == 1
    assert "dry runs" in refused.stderr
