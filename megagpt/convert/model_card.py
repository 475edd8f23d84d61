"""The model card of an export (README.md): what the model is, what it was made from, and how the export was checked."""

import json
from collections.abc import Mapping
from typing import Any

from megagpt.convert.compare_logits import Comparison
from megagpt.convert.families import Family, architecture_of
from megagpt.engine.build import whole_shapes
from megagpt.model.gpt import ModelConfig


def model_card(
    name: str, config: ModelConfig, family: Family, lineage: Mapping[str, Any], compared: Comparison, dtype: str
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    parameters = sum(shape.numel() for shape in whole_shapes(config).values())
    heads = f"{config.num_heads} query heads" + (f", {config.kv_heads} key/value heads" if config.num_kv_heads else "")
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: text-{'classification' if config.classes else 'generation'}",
        "tags: [megagpt]",
        "---",
        "",
        f"# {name}",
        "",
        f"A decoder-only transformer ({architecture_of(family, config)}), exported by MegaGPT.",
        "",
        "| | |",
        "| --- | --- |",
        f"| parameters | {parameters:,} |",
        f"| layers, width | {config.num_layers}, {config.hidden_size} |",
        f"| attention | {heads} of {config.head_width} |",
        f"| context | {config.seq_len:,} tokens |",
        f"| weights | {dtype} |",
        f"| tokenizer | {lineage['tokenizer']['kind']}, {lineage['tokenizer']['vocab_size']:,} ids |",
        f"| trained on | {lineage['tokens']:,} tokens, {lineage['step']:,} steps |",
        "",
        "```python",
        *_example(name, config),
        "```",
        "",
        "## Lineage",
        "",
        f"- Checkpoint `{lineage['checkpoint']}`, manifest sha256 `{lineage['manifest_sha256']}`.",
        f"- Tokenizer sha256 `{lineage['tokenizer']['sha256']}`.",
        *_made_from(lineage),
        "",
        "## Scores",
        "",
        *(_scores(lineage) or ["None were recorded."]),
        "",
        "## Check",
        "",
        f"The logits of MegaGPT and of transformers differ by at most {compared.largest_difference:.2g} where the largest is "
        f"{compared.largest_logit:.3g} ({compared.logits} positions, {compared.dtype}). `checked.json` holds every sha256.",
        "",
    ]
    return "\n".join(lines)


def _example(name: str, config: ModelConfig) -> list[str]:
    kind = "SequenceClassification" if config.classes else "CausalLM"
    call = "print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))"
    return [
        f"from transformers import AutoModelFor{kind}, AutoTokenizer",
        "",
        f'tokenizer, model = AutoTokenizer.from_pretrained("{name}"), AutoModelFor{kind}.from_pretrained("{name}")',
        'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
        "print(model.config.id2label[int(model(ids).logits.argmax())])" if config.classes else call,
    ]


def _made_from(lineage: Mapping[str, Any]) -> list[str]:
    lines = []
    if lineage["imported_from"]:
        lines.append(f"- Imported from {lineage['imported_from']['format']}:")
        lines += [f"  - `{name}` sha256 `{digest}`" for name, digest in lineage["imported_from"]["files"].items()]
    if lineage["data_fingerprint"]:
        lines.append(f"- Training data, fingerprint `{lineage['data_fingerprint']}`:")
    for name, source in lineage["data"].items():
        digest = f"manifest sha256 `{source['manifest_sha256']}`" if source["manifest_sha256"] else "its manifest is not here"
        lines.append(f"  - `{name}`, weight {source['weight']}, {digest}")
    return lines


def _scores(lineage: Mapping[str, Any]) -> list[str]:
    lines = []
    if lineage["validation_loss"] is not None:
        lines.append(f"- Validation loss {lineage['validation_loss']:.4f} nats per token.")
    for name, value in lineage["scores"].items():
        if name != "tasks":
            lines.append(f"- {name} {value:.4f}")
    for name, task in lineage["scores"].get("tasks", {}).items():
        lines.append(f"- {name}: `{json.dumps(task)}`")
    return lines
