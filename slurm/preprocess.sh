#!/bin/bash
#SBATCH --job-name=megagpt-corpus
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=megagpt-corpus-%j.log
# Runs the stages of a corpus, from dumps to shards, on all nodes of a job.
#
#   slurm/preprocess.sh CONFIG [key=value ...]                     submits itself with env.sh's options
#   sbatch [options] slurm/preprocess.sh CONFIG [key=value ...]    the same, from the project's root
#   stages="filter_documents dedup_documents" slurm/preprocess.sh ...    only some of the stages
#
# Each node works on its part of a stage (part=i/n) with a worker per core. Deduplication has phases that need all parts of the
# phase before: over several nodes it is run until its summary is there. What is committed stays, so a job that was
# preempted or ran into its time limit goes on where it was. A stage that fails ends the job and names the stage.
set -uo pipefail

say() { printf '%s preprocess.sh: %s\n' "$(date '+%F %T')" "$*"; }

fail() {
  say "$*" >&2
  exit 2
}

# Under sbatch this file is a copy in SLURM's spool, without its neighbours; run directly it lies beside env.sh.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
if [ -f "$here/env.sh" ]; then in_job=false root=$(dirname "$here"); else in_job=true root=${SLURM_SUBMIT_DIR:-}; fi
[ -f "$root/tools/extract_documents.py" ] || fail "no project at '$root': submit from the project's root, or run slurm/preprocess.sh directly"
cd "$root" || exit 2
# shellcheck source=slurm/env.sh
source slurm/env.sh
[ $# -ge 1 ] || fail "usage: slurm/preprocess.sh CONFIG [key=value ...]"
"${launch[@]}" "$python" tools/extract_documents.py "$@" --print > /dev/null || exit 2

if ! "$in_job"; then
  exec sbatch "${site_options[@]}" "${preprocess_options[@]}" slurm/preprocess.sh "$@"
fi

[ -n "${SLURM_JOB_ID:-}" ] || fail "not inside a SLURM job, and not beside env.sh"
export PYTHONUNBUFFERED=1 SRUN_CPUS_PER_TASK=$SLURM_CPUS_ON_NODE

stopping=false
trap 'stopping=true; kill "$srun_pid" 2> /dev/null' USR1

# run_on N COMMAND...: one task on each of N nodes; the tasks' status.
run_on() {
  local nodes=$1
  shift
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 "$@" &
  srun_pid=$!
  while kill -0 "$srun_pid" 2> /dev/null; do sleep 1; done # traps run between the sleeps
  wait "$srun_pid"
}

on_all_nodes() {
  # shellcheck disable=SC2016  # each task fills in its own number
  run_on "$SLURM_JOB_NUM_NODES" bash -c '"$@" "part=$SLURM_PROCID/$SLURM_NTASKS" "num_workers=$SLURM_CPUS_ON_NODE"' part "$@"
}

for stage in ${stages:-extract_documents filter_documents dedup_documents train_tokenizer tokenize_documents}; do
  say "$stage on $SLURM_JOB_NODELIST"
  command=("${launch[@]}" "$python" "tools/$stage.py" "$@")
  rounds=1
  if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    case $stage in
      dedup_documents) rounds=5 ;;    # index, bands, candidates, verification, writing
      tokenize_documents) rounds=3 ;; # counting or tokenizing, writing, completing
    esac
  fi
  for ((round = 1; round <= rounds; round++)); do
    if [ "$stage" = train_tokenizer ]; then run_on 1 "${command[@]}"; else on_all_nodes "${command[@]}"; fi
    status=$?
    if "$stopping"; then
      say "the time limit is near: goes back to the queue"
      scontrol requeue "$SLURM_JOB_ID" || exit 1
      sleep 60 # the requeue ends this script
    fi
    if [ "$status" != 0 ]; then
      say "$stage ended with status $status; the same command goes on from what is committed" >&2
      exit "$status"
    fi
  done
done
say "complete"
