"""The generate_text tool: text from the checkpoint of a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from megagpt.checkpoint.load_model import load_model
from megagpt.distributed.world import pick_device
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import stream_texts


class GenerateConfig(SamplingConfig):
    """Continue a prompt with the model of a run."""

    run_dir: Path
    """The run whose checkpoint is used."""
    step: int | Literal["last", "best"] = "last"
    """Which checkpoint: last, best (lowest validation loss), or a step."""
    prompt: str = ""
    """What the text begins with, as YAML: prompt='"ROMEO:\\n"' holds a line break. Empty = the start of a document."""
    num_samples: int = Field(default=1, gt=0)
    """How many texts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = the GPU if there is one."""


def generate_run(config: GenerateConfig) -> Iterator[tuple[int, str]]:
    """(sample, piece of text) as it is generated, sample by sample when there is one, interleaved when there are several.

    Raises UserError if the run has no such checkpoint.
    """
    loaded = load_model(config.run_dir, config.step, device=str(pick_device(config.device)))
    return stream_texts(loaded, [config.prompt] * config.num_samples, config)
