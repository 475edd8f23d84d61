"""Write a run's model for Hugging Face's transformers (and vLLM, lm-eval, ...); its logits are compared before it is kept.

python tools/export_model.py run_dir=runs/first output_dir=exports/first dtype=bf16
"""

from megagpt.command import main
from megagpt.convert.export_hf import ExportConfig, export_model


def run(config: ExportConfig) -> None:
    """Export and say where it is."""
    print(f"written: {export_model(config)}")


if __name__ == "__main__":
    main(ExportConfig, run, __doc__ or "")
