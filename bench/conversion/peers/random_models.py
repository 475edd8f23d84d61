"""In an environment with another transformers: `write FOLDER CASES` saves random models with their logits, `read FOLDER CASES`
loads the exports that were made of them, and writes their logits and whether each weight is the source's.

Not a part of megagpt: it must run without it.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": None, "eos_token_id": 256}
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
GPT2 |= {"bos_token_id": 256, "eos_token_id": 256}
IDS = (torch.arange(2 * 48) * 37 % 257).view(2, 48)
TEXT = "Zwölf Boxkämpfer 🙂 jagen\n\n  Viktor."


@torch.no_grad()
def write(folder: Path, cases: list) -> None:
    """Random models in fp32, every parameter away from its initial value."""
    for number, (model_type, changes) in enumerate(cases):
        torch.manual_seed(number)
        values = dict(GPT2) if model_type == "gpt2" else {**SIZES, **({} if model_type == "qwen2" else {"head_dim": 8})}
        values |= {"sliding_window": None} if model_type == "mistral" else {}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**values, **changes})).eval()
        for name, parameter in model.named_parameters():
            scale = 0.2 if "norm" in name or "ln_" in name or name.endswith("bias") else 0.1
            parameter.add_(torch.randn(parameter.shape) * scale)
        model.save_pretrained(folder / f"source_{number}")
        (folder / f"source_{number}" / "bytes.tokenizer").touch()
        torch.save(model(IDS).logits, folder / f"logits_{number}.pt")


@torch.no_grad()
def read(folder: Path, cases: list) -> None:
    """Logits of the exports, in fp32; of the fp32 export whether all weights are the source's bit for bit."""
    for number in range(len(cases)):
        source = AutoModelForCausalLM.from_pretrained(folder / f"source_{number}").eval().state_dict()
        found = {}
        for dtype in ("fp32", "bf16"):
            path = folder / f"{dtype}_{number}"
            stored = AutoModelForCausalLM.from_pretrained(path, torch_dtype="auto")
            found[f"{dtype}_stored"] = str(stored.dtype)
            model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
            found[dtype] = model(IDS).logits
            if dtype == "fp32":
                weights = model.state_dict()
                same = all(torch.equal(weights[name], part[: len(weights[name])]) for name, part in source.items())
                found["weights_equal"] = same and {*weights} == {*source}
        found["ids"] = AutoTokenizer.from_pretrained(folder / f"fp32_{number}")(TEXT).input_ids
        torch.save(found, folder / f"found_{number}.pt")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))
