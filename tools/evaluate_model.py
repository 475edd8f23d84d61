"""Evaluate a run's checkpoint: validation loss by source, tasks with right answers, lm-eval's tasks, generated answers.

python tools/evaluate_model.py run_dir=runs/plays step=best
python tools/evaluate_model.py run_dir=runs/gpt tasks.piqa=/data/eval/piqa.jsonl
python tools/evaluate_model.py run_dir=runs/gpt harness='[lambada_openai, piqa]' harness_folder=/data/harness
torchrun --nproc-per-node 8 tools/evaluate_model.py run_dir=runs/gpt harness='[hellaswag]'     (the ranks share the work)

Stopped, the same command resumes tasks and answers where they were. Several ranks end together with status 75 (SIGTERM,
SIGUSR1, Ctrl-C), one process at once by the signal (143 after SIGTERM, 130 after Ctrl-C).
"""

from megagpt.command import EXIT_DONE, EXIT_STOPPED, main
from megagpt.distributed.world import Stopped, joined_world
from megagpt.evaluate.evaluate_model import EvaluateConfig, describe, evaluate_run


def run(config: EvaluateConfig) -> int:
    """Print the scores, and where they are written."""
    with joined_world(config.device) as world:
        try:
            found = evaluate_run(config, world)
        except Stopped:
            return EXIT_STOPPED
        if world.rank == 0:
            print(describe(found))
    return EXIT_DONE


if __name__ == "__main__":
    main(EvaluateConfig, run, __doc__ or "")
