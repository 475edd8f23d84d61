"""Random models of every family from and to transformers 4.x, which has an environment of its own.

    python -m bench.conversion.other_transformers

transformers 4.x saves small random models (every family, tied and untied, each kind of rotary scaling); they are imported with
transformers 5.x beside megagpt, exported in fp32 and bf16, and loaded by 4.x again. Compared are our logits with the source's,
the logits that 4.x gives for both exports with ours (of bf16: with our weights rounded), every weight of the fp32 export with
the source's bit for bit, and the ids of the tokenizer. Logits may differ by 1e-5 of the largest.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import peer_python, peer_versions
from megagpt.checkpoint.load_model import load_model
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.convert.import_hf import ImportConfig, import_model
from megagpt.measurement import write_results
from megagpt.tokenizer.plain_bytes import Bytes

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {"tie_word_embeddings": tied}) for family in FAMILIES for tied in (False, True)),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    ("llama", {"rope_scaling": YARN}),
    ("qwen2", {"rope_scaling": YARN}),
    ("qwen3", {"head_dim": 16, "num_key_value_heads": 1, "rope_scaling": LLAMA3}),
    ("mistral", {"sliding_window": 64}),
]
IDS = (torch.arange(2 * 48) * 37 % 257).view(2, 48)
TEXT = "Zwölf Boxkämpfer 🙂 jagen\n\n  Viktor."


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value. Raises SystemExit above 1e-5, or where a greedy token differs."""
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-5 or not torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1)):
        raise SystemExit(f"logits differ by {difference:.3g} of the largest, or greedy tokens differ")
    return difference


@torch.no_grad()
def compare(folder: Path, number: int) -> dict[str, Any]:
    """A row: what differs between 4.x and us, both ways."""
    loaded = load_model(folder / f"run_{number}")
    logits = loaded.model(IDS)
    source = torch.load(folder / f"logits_{number}.pt")[..., :257]
    found = torch.load(folder / f"found_{number}.pt")
    row = {"imported_difference": relative(logits[..., :257], source)}
    row["fp32_export_difference"] = relative(found["fp32"], logits[..., :257])
    for parameter in loaded.model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    row["bf16_export_difference"] = relative(found["bf16"], loaded.model(IDS)[..., :257])
    stored = (found["fp32_stored"], found["bf16_stored"])
    if stored != ("torch.float32", "torch.bfloat16") or not found["weights_equal"] or found["ids"] != Bytes().encode(TEXT):
        raise SystemExit(f"types {stored}, weights equal: {found['weights_equal']}, ids {found['ids']}")
    return {**row, "weights_equal": True}


def main(words: Sequence[str]) -> None:
    """Write in 4.x, import, export, read in 4.x, compare."""
    python = peer_python("transformers4", ["transformers==4.57.6", "torch==2.13.0", "numpy"])
    program, rows = Path(__file__).parent / "peers" / "random_models.py", []
    with tempfile.TemporaryDirectory(prefix="bench_transformers4_") as temporary:
        folder = Path(temporary)
        subprocess.run([python, program, "write", folder, json.dumps(CASES)], check=True)
        for number in range(len(CASES)):
            import_model(ImportConfig(source=folder / f"source_{number}", run_dir=folder / f"run_{number}"))
            for dtype in ("fp32", "bf16"):
                out = folder / f"{dtype}_{number}"
                export_model(ExportConfig(run_dir=folder / f"run_{number}", output_dir=out, dtype=dtype))
        subprocess.run([python, program, "read", folder, json.dumps(CASES)], check=True)
        for number, (family, changes) in enumerate(CASES):
            row = {"family": family, "settings": " ".join(f"{key}={value}" for key, value in changes.items())}
            rows.append({**row, **compare(folder, number)})
            print(rows[-1], flush=True)
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    results = {"title": "Models from and to transformers 4.x", "about": about, "rows": rows}
    peers = peer_versions(python, ["transformers", "torch"])
    write_results("other_transformers", results, packages=("torch", "transformers"), peers=peers)


if __name__ == "__main__":
    main(sys.argv[1:])
