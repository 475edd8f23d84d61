"""The thread that generates: what becomes of jobs when a forward fails or is late, or a client leaves."""

import asyncio
from typing import Any

import pytest
import torch
from served import write_run

from megagpt.generate.sampling import SamplingConfig
from megagpt.serve.config import ServeConfig
from megagpt.serve.load import Served, load_served
from megagpt.serve.protocol import ApiError
from megagpt.serve.worker import Job, Piece, Worker


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    run_dir = write_run(tmp_path_factory.mktemp("worker") / "run", seq_len=128)
    return load_served(ServeConfig(run_dir=run_dir, device="cpu"))


def make_worker(served: Served, num_slots: int = 2, max_waiting: int = 4) -> Worker:
    return Worker(served, num_slots=num_slots, max_waiting=max_waiting, max_prompt_tokens=16)


def new_job(worker: Worker, *, max_tokens: int = 20, seconds: float = 60.0, **settings: Any) -> Job:
    sampling = SamplingConfig(max_tokens=max_tokens, **{"temperature": 0.0, **settings})
    return worker.new_job([1, 2, 3], sampling, at_start=False, seconds=seconds, num_logprobs=None)


async def result_of(job: Job) -> ApiError | str:
    text = ""
    while True:
        piece = await asyncio.wait_for(job.events.get(), 60)
        if isinstance(piece, ApiError):
            return piece
        text += piece.text
        if piece.finish_reason is not None:
            return text


def test_a_forward_that_fails_ends_all_jobs_and_the_worker(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> tuple[list[ApiError | str], bool]:
        worker, failed = make_worker(served, num_slots=1), asyncio.Event()
        jobs = [new_job(worker) for _ in range(3)]
        for job in jobs:
            worker.submit(job)
        worker.start(failed.set)
        results = [await result_of(job) for job in jobs]
        await asyncio.wait_for(failed.wait(), 30)
        with pytest.raises(ApiError, match="the server is ending"):
            worker.submit(new_job(worker))
        worker.end()
        return results, isinstance(worker.failure, RuntimeError)

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(served.loaded.model, "forward", broken)
    results, failed = asyncio.run(run())
    assert failed
    assert [(error.status, error.code) for error in results if isinstance(error, ApiError)] == [(500, "internal_error")] * 3
    assert "generation failed" in caplog.text


def test_jobs_that_are_late_or_given_up_leave_the_others_alone(served: Served) -> None:
    async def run() -> None:
        worker = make_worker(served)
        alone = new_job(worker, max_tokens=100)
        worker.submit(alone)
        worker.start(lambda: None)
        expected = await result_of(alone)
        jobs = {name: new_job(worker, max_tokens=100) for name in ("first", "cancelled", "waiting", "cancelled waiting")}
        late = new_job(worker, seconds=-1.0)
        for job in (*jobs.values(), late):
            worker.submit(job)
        worker.cancel(jobs["cancelled"])
        worker.cancel(jobs["cancelled waiting"])
        results = await result_of(jobs["first"]), await result_of(jobs["waiting"])
        assert results == (expected, expected)
        error = await result_of(late)
        assert isinstance(error, ApiError)
        assert (error.status, error.code) == (504, "timeout")
        assert (worker.num_running, worker.num_waiting) == (0, 0)
        assert jobs["cancelled waiting"].events.empty()
        assert worker.num_generated < 400
        worker.end()

    asyncio.run(run())


def test_the_end_of_the_worker_is_an_error_for_jobs_that_are_left(served: Served) -> None:
    async def run() -> list[ApiError | str]:
        worker = make_worker(served, num_slots=1)
        jobs = [new_job(worker, max_tokens=100) for _ in range(2)]
        for job in jobs:
            worker.submit(job)
        worker.start(lambda: None)
        first = await asyncio.wait_for(jobs[0].events.get(), 60)
        assert isinstance(first, Piece)
        await asyncio.to_thread(worker.end)
        return [await result_of(job) for job in jobs]

    results = asyncio.run(run())
    assert [error.code for error in results if isinstance(error, ApiError)] == ["shutting_down"] * 2


def test_the_queue_has_an_end(served: Served) -> None:
    worker = make_worker(served, num_slots=2, max_waiting=1)
    for _ in range(3):  # two slots are free, so that they wait for the thread only
        worker.submit(new_job(worker))
    with pytest.raises(ApiError, match="3 requests are waiting") as caught:
        worker.submit(new_job(worker))
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
