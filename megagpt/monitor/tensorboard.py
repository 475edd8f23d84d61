"""Write rows as TensorBoard event files in run_dir/tensorboard, without TensorFlow and without torch."""

import time
from pathlib import Path
from typing import Any

from megagpt.monitor.metrics import CONTINUES
from megagpt.monitor.writers import flat

FOLDER = "tensorboard"


class TensorBoardWriter:
    """Writes one event file per attempt. Steps that a restart or rewind repeats are shown once."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path) -> None:
        self._folder, self._file = run_dir / FOLDER, None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write the numbers of a row as scalars `<kind>/<name>`."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._file is None:  # not in __init__, which is on the training thread
            self._file = EventFileWriter(str(self._folder), flush_secs=30)
        now = time.time()
        if kind in CONTINUES:
            # The reader drops its data after this step; the row of the step itself stays.
            mark = SessionLog(status=SessionLog.START)
            self._file.add_event(Event(wall_time=now, step=step + 1, session_log=mark))
        numbers = [(name, value) for name, value in flat(kind, values) if type(value) in (int, float)]
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in numbers]
        if scalars:
            self._file.add_event(Event(wall_time=now, step=step, summary=Summary(value=scalars)))
        self._file.flush()  # after a kill, data that was not written would be missing

    def close(self) -> None:
        """Write the remaining data and close the file."""
        if self._file is not None:
            self._file.close()
