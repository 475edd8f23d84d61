"""Plan a run before it is submitted: memory per GPU, traffic, time, cost and checkpoints, and what to change. Needs no GPU.

    python tools/plan_run.py configs/train/gpt_7b.yaml gpus=64 gpu=h100_80gb
    python tools/plan_run.py configs/train/gpt_7b.yaml nodes=8 gpu=a100_80gb price_per_gpu_hour=1.8 storage_gb_per_second=20
    python tools/plan_run.py configs/train/gpt_7b.yaml sweep=[8,16,32,64,128] plot=sweep.svg
    python tools/plan_run.py configs/train/gpt_7b.yaml gpus=64 fit=true output=planned.yaml
    python tools/plan_run.py configs/train/gpt_7b.yaml gpus=64 preflight=true summary=true

Settings of the run may follow as in tools/train_model.py. Exit status 2 if the preflight finds something, or nothing fits.
"""

from megagpt.command import main
from megagpt.plan.run_plan import PlanConfig
from megagpt.plan.show import run

if __name__ == "__main__":
    main(PlanConfig, run, __doc__ or "")
