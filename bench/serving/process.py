"""tools/serve_model.py as a process, and a small real model for it."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.measurement import PROJECT

DATA = Path(os.environ.get("MEGAGPT_TEST_DATA", PROJECT.parent / "shared" / "data")) / "model"


def stories_run(folder: Path) -> Path:
    """A run directory, folder/stories, with stories260K of the test data."""
    run_dir = folder / "stories"
    import_model(ImportConfig(source=DATA / "stories260K.bin", tokenizer=DATA / "tok512.bin", run_dir=run_dir))
    return run_dir


@contextlib.contextmanager
def running_server(folder: Path, *words: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """(port, process) of a server with one thread on the CPU, which is ended with the block."""
    folder.mkdir(parents=True)
    command = [sys.executable, str(PROJECT / "tools" / "serve_model.py"), "port=0", "device=cpu", *words]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (found := re.search(r"serving .*:(\d+)", (folder / "log").read_text())):
            if process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{(folder / 'log').read_text()}")
            time.sleep(0.1)
        yield int(found[1]), process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
