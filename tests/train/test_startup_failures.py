"""What rank 0 cannot write as a training starts is said by every rank."""

from pathlib import Path

import pytest
from small_run import settings, start, write_shards

from megagpt.command import EXIT_CRASH, EXIT_USER_ERROR

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("blocked", ["config.yaml", "ledger.jsonl", "metrics.jsonl"])
def test_every_rank_names_the_file_that_rank_0_cannot_write(blocked: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / blocked / "in the way").mkdir(parents=True)
    ranks = start(PROJECT, tmp_path / "start", settings(write_shards(tmp_path / "shards"), run_dir), 2)
    statuses = ranks.wait()
    assert statuses[0] == statuses[1]
    assert statuses[0] in (EXIT_CRASH, EXIT_USER_ERROR)
    for rank in range(2):
        assert f"{run_dir / blocked}" in ranks.output(rank).splitlines()[-1], ranks.output(rank)
