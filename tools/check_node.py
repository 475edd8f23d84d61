"""Look whether a node is fit for training: GPUs (number, memory errors, heat, arithmetic), disks, an all-reduce over all nodes.

    python tools/check_node.py                                                this machine
    srun --ntasks-per-node=1 python tools/check_node.py run_dir=/shared/runs  every node of a job; slurm/pretrain.sh does it

One line per node: `check_node: NAME good`, or `check_node: NAME bad: reasons`. Exit status 0 good, 1 bad.
"""

from megagpt.command import EXIT_CRASH, EXIT_DONE, main
from megagpt.distributed.node_check import CheckNodeConfig, check_node, node_name


def run(config: CheckNodeConfig) -> int:
    """Print the node's line."""
    problems = check_node(config)
    print(f"check_node: {node_name()} {'bad: ' + '; '.join(problems) if problems else 'good'}", flush=True)
    return EXIT_CRASH if problems else EXIT_DONE


if __name__ == "__main__":
    main(CheckNodeConfig, run, __doc__ or "")
