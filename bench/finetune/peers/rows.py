"""The rows of fine-tuning in the order in which all contenders take them, and LoRA's first factors; torch and numpy alone."""

from typing import Any

import numpy as np
import torch


class ChatRows(torch.utils.data.Dataset):
    """Token ids and labels as transformers and litgpt take them: a label is the id at its own place, -100 is none."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._inputs, self._labels = np.load(job["inputs"]), np.load(job["labels"])

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.from_numpy(self._inputs[index]), "labels": torch.from_numpy(self._labels[index])}


def first_factors(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A of each of our layers, by its name: blocks.0.attention.query."""
    return torch.load(job["first_factors"])
