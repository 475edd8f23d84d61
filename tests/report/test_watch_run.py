"""Watching a run from its files: what is read, time left over restarts, panels and tables at three widths, damage."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from megagpt.command import EXIT_DONE, EXIT_USER_ERROR, run_words
from megagpt.files import write_json
from megagpt.monitor.metrics import METRICS_FILE, MetricsFollower, format_row, read_metrics
from megagpt.report.panel import run_panel, runs_table, span, sparkline
from megagpt.report.run_state import RunReader, RunState
from megagpt.report.watch_run import WatchConfig, watch

NOW = 2000.0
GPU = {
    "memory_used_gib": 61.5,
    "peak_allocated_gib": 58.25,
    "utilisation_percent": 97,
    "power_watts": 640,
    "throttled": "thermal",
}


def rows(*, ended: bool = False) -> list[dict[str, Any]]:
    """Two attempts: killed at step 40, and from step 30 on to 60; 10 s a step, 2 of them waiting for data."""
    found: list[dict[str, Any]] = [{"kind": "start", "step": 0, "incarnation": 1, "time": 1000.0, "seconds": {"start": 10.0}}]
    for attempt, steps, begun in ((1, (10, 20, 30, 40), 1000.0), (2, (40, 50, 60), 1500.0)):
        first = 0 if attempt == 1 else 30
        if attempt == 2:
            start = {"kind": "start", "step": 30, "incarnation": 2, "time": begun, "resumed": True, "seconds": {"start": 10.0}}
            found.append(start)
        for step in steps:
            done = step - first
            row = {"kind": "train", "step": step, "incarnation": attempt, "time": begun + 10.0 * done, "loss": 6 - step / 20}
            row |= {"lr": 3e-4, "grad_norm": 0.5, "tokens": step * 1_000_000, "tokens_per_second": 41_300.0, "mfu": 0.4512}
            found.append(row | {"seconds": {"start": 10.0, "train": 8.0 * done, "data_wait": 2.0 * done}, "gpu": GPU})
        if attempt == 1:
            found.append({"kind": "save", "step": 30, "incarnation": 1, "time": 1300.0})
    alert = {"alert": "disk", "reason": "\x1b[2J 3 GB free"}
    found.append({"kind": "alert", "step": 60, "incarnation": 2, "time": 1800.0, **alert})
    if ended:
        found.append({"kind": "done", "step": 60, "incarnation": 2, "time": 1810.0})
    return found


def write_run(run_dir: Path, *, ended: bool = False) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / METRICS_FILE).write_bytes(b"".join(map(format_row, rows(ended=ended))))
    config = {"max_steps": 100, "save_every_steps": 25}
    for attempt in (1, 2):
        write_json(run_dir / "starts" / f"{attempt:04d}.json", {"incarnation": attempt, "config": config})
    return run_dir


def shown(renderable: Any, width: int) -> list[str]:
    console = Console(width=width, force_terminal=False, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


def test_the_state_of_a_run_over_a_restart(tmp_path: Path) -> None:
    state = RunReader(write_run(tmp_path / "plays")).read(1805.0)
    assert (state.name, state.status, state.step, state.max_steps) == ("plays", "running", 60, 100)
    assert (state.attempt, state.num_attempts, state.last_row) == (2, 2, 1800.0)
    assert state.losses == (5.5, 5.0, 4.5, 4.0, 3.5, 3.0)  # step 40 of the first attempt was done again
    assert (state.step_seconds, state.eta_seconds) == (10.0, 400.0)
    # From 990, when the first process began, to the last row with seconds: 810 s for 60 steps, of which 40 are left.
    assert state.eta_with_restarts_seconds == pytest.approx(40 * 810 / 60)
    assert state.data_wait == pytest.approx(0.2)
    assert (state.saved_step, state.next_save_step, state.next_save_seconds) == (30, 75, 150.0)
    assert state.gpu == {name: value for name, value in GPU.items() if name != "throttled"}
    assert [row["kind"] for row in state.events] == ["start", "save", "start", "alert"]


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, "silent"), ({"kind": "done"}, "finished"), ({"kind": "stop"}, "stopped"), ({"kind": "watchdog"}, "hung")],
)
def test_status_and_what_an_ended_run_has_no_more(tmp_path: Path, change: dict[str, Any], status: str) -> None:
    path = write_run(tmp_path / "plays") / METRICS_FILE
    last = {"kind": "save", "step": 60, "incarnation": 2, "time": 1810.0, **change}
    path.write_bytes(path.read_bytes() + format_row(last))
    state = RunReader(path.parent).read(1810.0 + 5 * 100 + 1)  # a row every 100 s
    assert state.status == status
    assert (state.eta_seconds is None) == (status != "silent")
    assert (state.next_save_step is None) == (status != "silent")
    assert RunReader(path.parent).read(1810.0 + 5 * 100 - 1).status == ("running" if status == "silent" else status)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_panel_fits_and_shows_it_all(tmp_path: Path, width: int) -> None:
    state = RunReader(write_run(tmp_path / "plays")).read(1805.0)
    lines = shown(run_panel(state, width), width)
    assert {len(line) for line in lines} == {width}
    text = re.sub(r"[\s│]+", " ", "".join(line.strip("│") for line in lines))
    for expected in ("running plays", "60 / 100 60.0%", "7 min (", "9 min with restarts", "loss 3.0000", "41.3 k", "45.1%",
                     "data wait 20.0%", "61.5 GiB, peak 58.2", "97 %, 640 W", "step 30", "step 75 in 2 min", "attempt 2",
                     "5 s ago", "█", "from a checkpoint", "\\x1b[2J 3 GB free"):  # fmt: skip
        assert expected in text, expected
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_name_is_not_cut_off(tmp_path: Path, width: int) -> None:
    name = "llama-1b3-" * 9
    lines = shown(run_panel(RunReader(write_run(tmp_path / name)).read(1805.0), width), width)
    assert {len(line) for line in lines} == {width}
    assert name in "".join(line.strip("│ ") for line in lines)
    assert "running" in lines[0]


def test_long_events_continue_where_they_begin(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "plays")
    alert = {"kind": "alert", "step": 60, "incarnation": 2, "time": 1800.0, "alert": "thermal", "reason": "hot " * 30}
    with (run_dir / METRICS_FILE).open("ab") as file:
        file.write(format_row(alert))
    state = RunReader(run_dir).read(1805.0)
    wide = [line.strip("│") for line in shown(run_panel(state, 80), 80)]
    first = next(number for number, line in enumerate(wide) if "alert  thermal  hot" in line)
    begin = wide[first].index("alert")
    assert wide[first + 1].strip().startswith("hot")
    assert wide[first + 1].index("hot") == begin
    narrow = [line.strip("│") for line in shown(run_panel(state, 40), 40)]
    first = next(number for number, line in enumerate(narrow) if "alert  thermal  hot" in line)
    assert narrow[first - 1].rstrip() == "      5 s ago  step 60"
    assert {len(line) - len(line.lstrip()) for line in narrow[first : first + 3]} == {5}
    assert any(line.rstrip().endswith("ago  step 30  save") for line in narrow), "on one line if it fits"


@pytest.mark.parametrize(("width", "columns"), [(40, 4), (80, 6), (120, 10)])
def test_the_table_of_runs_leaves_out_columns(tmp_path: Path, width: int, columns: int) -> None:
    states = [RunReader(write_run(tmp_path / name)).read(1805.0) for name in ("plays", "a_run_with_a_long_name" * 4)]
    lines = shown(runs_table(states, width), width)
    assert max(map(len, lines)) <= width
    head = next(line for line in lines if "status" in line)
    assert len(re.findall(r"\S+(?: \S+)*", head)) == columns
    step = " 60% " if width == 40 else "60/100"
    assert any("plays" in line and "running" in line and step in line and "3.0000" in line for line in lines)


@pytest.mark.parametrize("value", ["abc", None, [1], float("nan"), True, {"a": 1}])
def test_values_of_other_types_are_left_out(tmp_path: Path, value: Any) -> None:
    damaged = [{**row, **dict.fromkeys(("loss", "mfu", "tokens_per_second", "gpu", "grad_norm"), value)} for row in rows()]
    path = tmp_path / METRICS_FILE
    path.write_bytes(b"".join(map(format_row, damaged)))
    state = RunReader(tmp_path).read(1805.0)
    assert (state.loss, state.mfu, state.tokens_per_second, state.gpu, state.losses) == (None, None, None, {}, ())
    assert shown(run_panel(state, 80), 80)


def test_damage_is_one_line_each(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "plays")
    with (run_dir / METRICS_FILE).open("ab") as file:
        file.write(b'\x00\xff\n{"kind":"train","step":70,"time":1.0,"incarnation":2,"seconds":{"train":"x"}}\n{"kind":"tra')
    (run_dir / "starts" / "0002.json").write_text("{")
    state = RunReader(run_dir).read(1805.0)
    assert state.problems == (
        "metrics.jsonl: 2 damaged lines left out",
        "starts/0002.json: damaged, so max_steps and the next save are not known",
    )
    assert (state.step, state.max_steps) == (60, None)
    assert sum(line.startswith("│ ! ") for line in shown(run_panel(state, 80), 80)) == 2


def test_a_run_without_rows_has_not_started(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).touch()
    state = RunReader(tmp_path).read(NOW)
    assert state == RunState(tmp_path.name, "not started", NOW)
    assert "not started" in shown(run_panel(state, 40), 40)[0]


def test_a_follower_reads_what_is_new_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path, lines = tmp_path / METRICS_FILE, [format_row(row) for row in rows()]
    follower = MetricsFollower(tmp_path)
    path.write_bytes(b"")
    for i, line in enumerate(lines):
        with path.open("ab") as file:
            file.write(line[:9])
            file.flush()
            assert len(follower.read().all_rows) == i
            file.write(line[9:])
        assert follower.read() == read_metrics(tmp_path)
    path.write_bytes(b"".join(lines[:3]))
    assert follower.read() == read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "–"), (5.2, "5 s"), (300, "5 min"), (7500, "2 h 05"), (357_000, "4 d 03 h")]
)
def test_spans(seconds: float | None, words: str) -> None:
    assert span(seconds) == words


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 2, 6, 8], 2) == "▁█"
    assert sparkline([1, 1], 8) == "▁▁"


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a" / "plays", ended=True)
    (tmp_path / "a" / "broken").mkdir()
    (tmp_path / "a" / "broken" / METRICS_FILE).mkdir()
    words = [f"run_dir={tmp_path}/a/plays", "once=true", "width=80"]
    assert run_words(WatchConfig, watch, "", words) == EXIT_DONE
    assert "finished  plays" in capsys.readouterr().out
    assert run_words(WatchConfig, watch, "", [f"runs={tmp_path}", "once=true", "width=120"]) == EXIT_DONE
    out = capsys.readouterr().out
    assert re.search(r"a/plays +finished +60/100 ", out)
    assert re.search(r"a/broken +not readable ", out)
    for word, message in (
        (f"run_dir={tmp_path}/none", "none/metrics.jsonl: No such file or directory: not the directory of a run"),
        (f"runs={tmp_path}/a/broken/metrics.jsonl", "no metrics.jsonl below it"),
        (f"runs={tmp_path}/none", "none: not a folder"),
        ("num_events=1", "give one of run_dir and runs"),
    ):
        assert run_words(WatchConfig, watch, "", [word]) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err


def test_it_imports_no_torch_and_changes_no_file(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "plays")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    code = "import sys; sys.modules['torch'] = None\nimport watch_run\nfrom megagpt.report.watch_run import *\n"
    code += f"watch(WatchConfig(run_dir={str(run_dir)!r}, once=True))"
    tools = Path(__file__).resolve().parents[2] / "tools"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": f"{tools}:{tools.parent}"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "plays" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_of_many_rows_only_the_new_ones_are_parsed_again(tmp_path: Path) -> None:
    row = {"kind": "train", "time": 1.0, "incarnation": 1, "loss": 2.0, "seconds": {"train": 1.0}}
    (tmp_path / METRICS_FILE).write_bytes(b"".join(format_row({**row, "step": step}) for step in range(20_000)))
    reader = RunReader(tmp_path)
    assert reader.read(2.0).step == 19_999
    began = time.process_time()
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(orjson.dumps({**row, "step": 20_000}) + b"\n")
    assert reader.read(2.0).step == 20_000
    assert time.process_time() - began < 2
