"""What stands in a checkpoint's file of evaluations after several of them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from megagpt.evaluate.results import keep_result, read_results
from megagpt.files import read_json, write_json


def test_each_measurement_has_one_result(tmp_path: Path) -> None:
    path = tmp_path / "step_00000007.json"
    assert read_results(path) == []
    for samples, loss in ((None, 2.0), (10, 2.5), (None, 2.1)):
        keep_result(path, {"step": 7, "loss": loss, "measured": {"max_samples": samples}})
    assert [found["loss"] for found in read_results(path)] == [2.5, 2.1]
    assert (read_json(path)["format"], read_json(path)["step"]) == (2, 7)


def test_the_only_result_of_an_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "step_00000007.json"
    write_json(path, {"step": 7, "loss": 3.0})
    keep_result(path, {"step": 7, "loss": 2.0, "measured": {}})
    assert [found["loss"] for found in read_results(path)] == [3.0, 2.0]


ADD = """
import sys
from pathlib import Path
from megagpt.evaluate.results import keep_result
print("ready", flush=True)
sys.stdin.readline()
for number in range(25):
    keep_result(Path(sys.argv[1]), {"step": 7, "measured": {"task": f"{sys.argv[2]} {number}"}})
"""


def test_results_that_two_evaluations_write_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "evaluations" / "step_00000007.json"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", ADD, str(path), name], **pipes) for name in ("a", "b")]
    assert [writer.stdout.readline() for writer in writers if writer.stdout] == ["ready\n"] * 2
    for writer in writers:
        if writer.stdin:
            writer.stdin.write("go\n")
            writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=900)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert {found["measured"]["task"] for found in read_results(path)} == {f"{name} {i}" for name in "ab" for i in range(25)}
