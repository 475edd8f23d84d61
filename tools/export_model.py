"""Write a run's model for Hugging Face's transformers (and vLLM, lm-eval, ...); its logits are compared before it is kept.

python tools/export_model.py run_dir=runs/first output_dir=exports/first dtype=bf16
torchrun --nproc-per-node 4 tools/export_model.py run_dir=runs/7b output_dir=exports/7b     (the ranks share the weight files)
"""

from megagpt.command import main
from megagpt.convert.export_hf import ExportConfig, export_model
from megagpt.distributed.world import joined_world


def run(config: ExportConfig) -> None:
    """Export and say where it is."""
    with joined_world("cpu") as world:
        path = export_model(config, world)
        if world.rank == 0:
            print(f"written: {path}")


if __name__ == "__main__":
    main(ExportConfig, run, __doc__ or "")
