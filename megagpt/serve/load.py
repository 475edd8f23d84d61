"""Load the model to serve, from a run or from an export."""

import time
from dataclasses import dataclass

import torch

from megagpt.checkpoint.load_model import LoadedModel, load_model
from megagpt.config import UserError
from megagpt.distributed.world import pick_device
from megagpt.serve.config import ServeConfig
from megagpt.tokenizer.chat_template import FILE_NAME, ChatTemplate, read_chat_template


@dataclass(frozen=True)
class Served:
    """A loaded model, with its name in requests and its limits."""

    loaded: LoadedModel
    name: str
    max_context: int
    chat: ChatTemplate | None
    device: torch.device
    created: int
    """When the server started, in seconds since 1970."""


def load_served(config: ServeConfig) -> Served:
    """Load the model that the settings name. Raises UserError naming the setting, CheckpointError for a damaged checkpoint."""
    device = pick_device(config.device)
    if config.run_dir is not None:
        loaded = load_model(config.run_dir, config.step, device=str(device))
        folder, template = config.run_dir, config.run_dir / "tokenizer" / FILE_NAME
    else:
        from megagpt.convert.load_export import load_export

        assert config.export is not None
        loaded = load_export(config.export, device=str(device))
        folder, template = config.export, config.export / FILE_NAME
    seq_len = loaded.model_config.seq_len
    if config.max_context is not None and config.max_context > seq_len:
        raise UserError(f"max_context={config.max_context}: the model's seq_len is {seq_len}")
    if config.precision == "bf16":
        loaded.model.to(torch.bfloat16)
    return Served(
        loaded=loaded,
        name=config.model_name or folder.resolve().name,
        max_context=config.max_context or seq_len,
        chat=read_chat_template(template, loaded.tokenizer),
        device=device,
        created=int(time.time()),
    )
