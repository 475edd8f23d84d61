"""The generate_text tool: text from the checkpoint of a run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megagpt.checkpoint.load_model import load_model
from megagpt.config import UserError
from megagpt.distributed.world import pick_device
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import stream_texts
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.chat_template import FILE_NAME, ChatError, read_chat_template


class GenerateConfig(SamplingConfig):
    """Continue a prompt with the model of a run."""

    run_dir: Path
    """The run whose checkpoint is used."""
    step: int | Literal["last", "best"] = "last"
    """Which checkpoint: last, best (lowest validation loss), or a step."""
    prompt: str = ""
    """What the text begins with, as YAML: prompt='"ROMEO:\\n"' holds a line break. Empty = the start of a document."""
    messages: tuple[dict[str, str], ...] = ()
    """A chat to be answered, by the chat template in the run's tokenizer folder: [{role: user, content: Hello}]."""
    num_samples: int = Field(default=1, gt=0)
    """How many texts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = the GPU if there is one."""

    @model_validator(mode="after")
    def _check_messages(self) -> "GenerateConfig":
        if self.messages and self.prompt:
            raise ValueError("prompt and messages are given: a text continues the one or answers the other")
        for number, message in enumerate(self.messages):
            if set(message) != {"role", "content"}:
                raise ValueError(
                    f"messages[{number}]: role and content are expected, not {', '.join(sorted(message)) or 'none'}"
                )
        return self


def generate_run(config: GenerateConfig) -> Iterator[tuple[int, str]]:
    """(sample, piece of text) as it is generated, sample by sample when there is one, interleaved when there are several.

    Raises UserError if the run has no such checkpoint, or no chat template that takes the messages.
    """
    loaded = load_model(config.run_dir, config.step, device=str(pick_device(config.device)))
    prompt = chat_prompt(config.run_dir, loaded.tokenizer, config.messages) if config.messages else config.prompt
    return stream_texts(loaded, [prompt] * config.num_samples, config)


def chat_prompt(run_dir: Path, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation up to where its next answer begins. Raises UserError if the run's template refuses it."""
    path = run_dir / "tokenizer" / FILE_NAME
    template = read_chat_template(path, tokenizer)
    if template is None:
        raise UserError(f"messages: the model has no chat template, {path} is not there: give a prompt")
    try:
        return template.ids(messages)
    except ChatError as error:
        raise UserError(f"messages: {path} refuses them: {error}") from None
