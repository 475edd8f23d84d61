"""An export opened as our own model, without a run directory and without transformers: to serve it."""

import tempfile
from pathlib import Path

import torch

from megagpt.checkpoint.load_model import LoadedModel, refuse_classifier
from megagpt.config import UserError
from megagpt.convert.import_hf import check_vocabulary, read_source, source_tensors
from megagpt.convert.tokenizers import import_tokenizer
from megagpt.engine.build import whole_shapes
from megagpt.files import read_json, sha256_file
from megagpt.model.gpt import GPT

RECORD = "checked.json"


def load_export(folder: Path, device: str = "cpu") -> LoadedModel:
    """The model of a folder that tools/export_model.py wrote, in fp32 and evaluation mode.

    Raises UserError if it is no such folder, or its files are not those that the export was checked with.
    """
    if not folder.is_dir():
        raise UserError(f"export={folder}: no such folder")
    if not (folder / RECORD).is_file():
        raise UserError(
            f"export={folder}: holds no {RECORD}, so tools/export_model.py did not write it; "
            "tools/import_model.py makes a run directory of a model that was trained elsewhere"
        )
    record = read_json(folder / RECORD)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict):
        raise UserError(f"{folder / RECORD}: files: names and sha256 sums are expected")
    for name, digest in files.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"export={folder}: {name} is missing")
        if sha256_file(folder / name) != digest:
            raise UserError(f"export={folder}: {name} is not the file that was checked: its sha256 differs from {RECORD}")
    _, config, weights, plan = read_source(folder, None)
    refuse_classifier(config, folder)
    model = GPT(config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in source_tensors(plan, weights, whole_shapes(config)):
            parameters[name].copy_(tensor.view_as(parameters[name]))
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = import_tokenizer(folder, None, Path(temporary))
    check_vocabulary(tokenizer, config, folder)
    source = record.get("source")
    step = source.get("step", 0) if isinstance(source, dict) else 0
    return LoadedModel(model.to(device).eval(), config, tokenizer, step, {}, folder)
