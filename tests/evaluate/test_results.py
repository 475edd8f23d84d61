"""What stands in a checkpoint's file of evaluations after several of them."""

from pathlib import Path

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
