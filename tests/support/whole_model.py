"""The least engine that checkpoints can be made of and loaded into: one process, weights only, no group of processes."""

from dataclasses import dataclass

from megagpt.engine.base import Partition
from megagpt.model.gpt import GPT


@dataclass
class WholeModel:
    """All parameters of a model as partitions."""

    model: GPT
    updates: int = 0

    def state(self) -> dict[str, Partition]:
        """Whole parameters, flattened."""
        flat = {f"param.{name}": parameter.data.flatten() for name, parameter in self.model.named_parameters()}
        return {key: Partition(data, 0, data.numel()) for key, data in flat.items()}

    def frozen(self) -> dict[str, Partition]:
        """Everything is trained."""
        return {}

    def refresh(self, updates: int) -> None:
        """Take over the number of updates of what was loaded."""
        self.updates = updates
