"""Micro-batches to the device: on a GPU the next one is copied while the current one is computed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megagpt.data.loader import MicroBatch

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""ids, targets, document lengths and sources."""


class Feed:
    """Copies micro-batches to a device; on a GPU from pinned memory and on a stream of its own, so nothing waits for a copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Inputs]]:
        """Each micro-batch with its tensors on the device; the copy of the next one has begun by then."""
        coming = self._begin(batches[0]) if batches else None
        for number, batch in enumerate(batches):
            assert coming is not None
            current, coming = coming, self._begin(batches[number + 1]) if number + 1 < len(batches) else None
            yield batch, self._ready(*current)

    def _begin(self, batch: MicroBatch) -> tuple[Inputs, Any]:
        if self._stream is None:
            lengths, sources = (None if x is None else x.to(self._device) for x in (batch.doc_lengths, batch.sources))
            return (batch.ids.to(self._device), batch.targets.to(self._device), lengths, sources), None
        with torch.cuda.stream(self._stream):  # torch reuses pinned memory only after the copies from it
            ids, targets, lengths, sources = (
                None if tensor is None else tensor.pin_memory().to(self._device, non_blocking=True)
                for tensor in (batch.ids, batch.targets, batch.doc_lengths, batch.sources)
            )
            assert ids is not None
            assert targets is not None
            return (ids, targets, lengths, sources), self._stream.record_event()

    def _ready(self, inputs: Inputs, event: Any) -> Inputs:
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for tensor in inputs:
                if tensor is not None:
                    tensor.record_stream(stream)
        return inputs
