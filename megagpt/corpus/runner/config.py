"""Execution settings of every corpus tool: workers, parts, executor."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megagpt.config import Config


class Execution(Config):
    """How a stage is run. None of these settings changes a document of a result; `block_bytes` changes where zstd frames
    begin."""

    num_workers: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1)
    """Worker processes on this machine (executor=process). Default: the cores this process may use."""
    part: str = Field(default="0/1", pattern=r"^\d+/[1-9]\d*$")
    """i/n processes every n-th block from the i-th (from 0), for job arrays. The part that ends last completes the files."""
    executor: Literal["process", "dask", "inline"] = "process"
    """process: a pool on this machine. dask: the workers of a running Dask scheduler (set scheduler_file).
    inline: no workers, one block after the other in this process, for a debugger or a very small corpus."""
    scheduler_file: Path | None = None
    """The Dask scheduler's file, on a file system that all machines share."""
    block_bytes: int = Field(default=64 << 20, ge=1)
    """Large input files are split into blocks of about this size; a killed worker redoes at most one block."""
    overwrite: bool = False
    """Replace an output made with other settings; false refuses it."""
    verify: bool = False
    """Compare the sha256 of every input and finished file, not its size alone."""

    @model_validator(mode="after")
    def _check(self) -> "Execution":
        index, count = self.part_of
        if index >= count:
            raise ValueError(f"part={self.part}: parts of {count} are 0/{count} to {count - 1}/{count}")
        if self.executor == "dask" and self.scheduler_file is None:
            raise ValueError("executor=dask needs scheduler_file")
        if self.overwrite and count > 1:
            raise ValueError("overwrite=true with part=i/n would let one part delete another's work")
        return self

    @property
    def num_processes(self) -> int:
        """Processes of this machine that share its memory."""
        return 1 if self.executor == "inline" else self.num_workers

    @property
    def part_of(self) -> tuple[int, int]:
        """(index, count) of this part."""
        index, _, count = self.part.partition("/")
        return int(index), int(count)
