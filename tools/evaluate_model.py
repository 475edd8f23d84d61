"""Evaluate a run's checkpoint: validation loss, perplexity and bits per byte by source, and tasks with right answers.

python tools/evaluate_model.py run_dir=runs/plays step=best
python tools/evaluate_model.py run_dir=runs/gpt tasks.piqa=/data/eval/piqa.jsonl
"""

from megagpt.command import main
from megagpt.evaluate.evaluate_model import EvaluateConfig, describe, evaluate_run


def run(config: EvaluateConfig) -> None:
    """Print the scores, and where they are written."""
    print(describe(evaluate_run(config)))


if __name__ == "__main__":
    main(EvaluateConfig, run, __doc__ or "")
