"""The objects of one start of a run: engine, data, monitor, saver and so on."""

from dataclasses import dataclass, field
from typing import Any

from megagpt.checkpoint import save_load as checkpoint
from megagpt.data.open_data import Data
from megagpt.distributed.world import World
from megagpt.engine.base import Engine
from megagpt.evaluate.scores_in_training import Questions
from megagpt.monitor.monitor import Monitor
from megagpt.train.background_export import BackgroundExports
from megagpt.train.config import TrainConfig
from megagpt.train.out_of_memory import Planner
from megagpt.train.spike_guard import Guard
from megagpt.watchdog.watchdog import Watchdog


@dataclass(frozen=True)
class Run:
    """What one start of a run works with."""

    config: TrainConfig
    data: Data
    world: World
    engine: Engine
    monitor: Monitor
    watchdog: Watchdog
    guard: Guard
    attempt: int
    saver: checkpoint.Saver
    exports: BackgroundExports
    settings: dict[str, str]
    """See digest_settings."""
    questions: Questions | None = None
    """Tasks and exercises that score it besides validation data."""
    planner: Planner | None = None
    """The memory that a step is expected to need, for the message when it runs out."""
    base: dict[str, Any] = field(default_factory=dict)
    """Of a run that freezes something: the checkpoint that the frozen weights are from (checkpoint.base_weights)."""
