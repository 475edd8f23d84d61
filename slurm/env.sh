# Site settings, the only file to edit for SLURM. Both job scripts source it, on the login node and inside the job.
# shellcheck shell=bash disable=SC2034  # the scripts that source this file use the variables

# What both scripts pass to sbatch. Whole nodes, so that every rank gets its share of cores and memory. Ranges of nodes
# (--nodes=1-3) are fine. Tasks are not asked for here: the scripts start one per GPU.
site_options=(
  # --account=...
  # --partition=...
  --exclusive
  --mem=0
)
pretrain_options=(--nodes=1 --gpus-per-node=8 --time=24:00:00)
preprocess_options=(--nodes=1 --time=24:00:00)
serve_options=(--nodes=1 --gpus-per-node=1 --time=08:00:00)

# What `slurm/pretrain.sh` and `slurm/preprocess.sh` run without words: CONFIG [key=value ...]
pretrain_words=(configs/train/gpt_124m.yaml)
preprocess_words=(configs/corpus/common_crawl.yaml)

# The kind of GPU, a name of megagpt/plan/hardware.yaml, for the plan that slurm/pretrain.sh prints before it submits. Another
# name gets the memory plan and no time. Empty: no plan.
gpu=${gpu:-h100_80gb}

# What `slurm/serve.sh` serves without words: run_dir=RUN or export=FOLDER [key=value ...]
serve_words=()

# The Python that has megagpt, at a path that every node sees; modules, if the site has them, are loaded here.
# module load cuda
python=${python:-$PWD/.venv/bin/python}

# What stands before python in every task, for a container: launch=(apptainer exec --nv /shared/megagpt.sif)
launch=()

# Ranks per node. Empty: as many as the job has GPUs on a node (1 without GPUs).
tasks_per_node=${tasks_per_node:-}

# Where rank 0 listens. Empty: the first node of the job, by name.
master_addr=${master_addr:-}

# The address or interface name of every node on which Dask listens (executor=dask). Empty: the one of the host's name.
dask_host=${dask_host:-}

# The job starts again after a crash, until so many starts in a row have not brought a newer checkpoint.
max_starts_without_progress=${max_starts_without_progress:-3}

# How long the check of the nodes may take before the first start and after a failure. A node that is not done is bad.
node_check_seconds=${node_check_seconds:-300}

# Kernels of torch.compile and Triton: on each node's own disk, filled from an archive on the shared one (slurm/compiled.sh).
compiled_here=${compiled_here:-${TMPDIR:-/tmp}/megagpt_compiled_$UID}
compiled_archive=${compiled_archive:-$PWD/runs/cache/compiled.tar}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$compiled_here/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$compiled_here/triton}
# DeepSpeed's operations: one cache on a disk that all nodes share.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/runs/cache/torch_extensions}

# Network. The names of the interfaces, where NCCL or gloo pick a wrong one:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# CUDA's allocator grows segments instead of fragmenting them.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# The update of offloaded states takes all cores of a rank whatever this says.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
