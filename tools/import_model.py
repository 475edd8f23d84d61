"""Make a run directory from a model of Hugging Face's transformers or of llama2.c; its logits are compared before it is kept.

python tools/import_model.py source=/models/SmolLM-135M run_dir=runs/smollm
"""

from megagpt.command import main
from megagpt.convert.import_hf import ImportConfig, import_model


def run(config: ImportConfig) -> None:
    """Import and say where the checkpoint is."""
    print(f"written: {import_model(config)}")


if __name__ == "__main__":
    main(ImportConfig, run, __doc__ or "")
