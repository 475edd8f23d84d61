#!/bin/bash
#SBATCH --job-name=megagpt
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=megagpt-%j.log
# Trains on SLURM, over as many starts as it takes.
#
#   slurm/pretrain.sh CONFIG [key=value ...]                     checks and plans the run, then submits it with env.sh's options
#   sbatch [options] slurm/pretrain.sh CONFIG [key=value ...]    the same without the check beforehand, from the project's root
#
# Without words it runs those that env.sh names. A job that was submitted without options, and so has no GPUs or too few nodes,
# submits itself once with env.sh's.
#
# The same command runs at every start; the trainer resumes from its newest good checkpoint. What becomes of the job:
#   0   the run is complete
#   2   usage or configuration error: ends, is not started again
#   75  stopped on request (time limit, preemption), with a checkpoint if there was an update to save: starts again
#   76  ended by the watchdog: starts again
#   else  a crash: starts again, until max_starts_without_progress starts in a row brought no newer checkpoint
# Before its first start and after a failure the nodes are checked; if some are bad, a successor without them is submitted.
set -uo pipefail

say() { printf '%s pretrain.sh: %s\n' "$(date '+%F %T')" "$*"; }

fail() {
  say "$*" >&2
  exit 2
}

# Under sbatch this file is a copy in SLURM's spool, without its neighbours; run directly it lies beside env.sh.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
if [ -f "$here/env.sh" ]; then in_job=false root=$(dirname "$here"); else in_job=true root=${SLURM_SUBMIT_DIR:-}; fi
[ -f "$root/tools/train_model.py" ] || fail "no project at '$root': submit from the project's root, or run slurm/pretrain.sh directly"
cd "$root" || exit 2
# shellcheck source=slurm/env.sh
source slurm/env.sh
# shellcheck source=slurm/resubmit.sh
source slurm/resubmit.sh
# shellcheck source=slurm/compiled.sh
source slurm/compiled.sh
[ $# -ge 1 ] || set -- "${pretrain_words[@]}"
[ $# -ge 1 ] || fail "usage: slurm/pretrain.sh CONFIG [key=value ...]"

# Without SLURM's variables: a check is one process by itself, wherever it runs.
check() {
  env -u SLURM_PROCID -u SLURM_STEP_NUM_TASKS "${launch[@]}" "$python" tools/train_model.py "$@" || {
    local status=$?
    [ "$status" = 2 ] || say "the check before the start ended with status $status" >&2
    exit 2
  }
}

# The plan in six lines and what the preflight finds. Its memory and times are estimates: they warn, and do not stop a submission.
plan() {
  local asked="${site_options[*]} ${pretrain_options[*]}"
  [ -n "$gpu" ] && [[ $asked == *gpu* ]] || return 0
  "${launch[@]}" "$python" tools/plan_run.py "$@" "gpu=$gpu" "sbatch=$asked" script=slurm/pretrain.sh preflight=true summary=true ||
    say "the plan has warnings (above); the job is submitted" >&2
}

if ! "$in_job"; then
  check "$@" check=true
  plan "$@"
  # A successor of this job has to be submitted with the same options.
  export MEGAGPT_SBATCH_OPTIONS="${site_options[*]} ${pretrain_options[*]}"
  exec sbatch "${site_options[@]}" "${pretrain_options[@]}" slurm/pretrain.sh "$@"
fi

[ -n "${SLURM_JOB_ID:-}" ] || fail "not inside a SLURM job, and not beside env.sh"
resubmit_if_plain slurm/pretrain.sh "${site_options[@]}" "${pretrain_options[@]}" -- "$@"
MEGAGPT_JOB_STARTED_AT=$(date +%s)
check "$@" check=true

# read_run_dir CONFIG [key=value ...]: run_dir alone, without the seconds that importing torch takes.
read_run_dir() {
  "${launch[@]}" "$python" - "$@" << 'PYTHON'
import sys
from pathlib import Path
from pydantic import ConfigDict
from megagpt.config import Config, load

class Settings(Config):
    model_config = ConfigDict(extra="ignore")
    run_dir: Path

print(load(Settings, sys.argv[1:]).run_dir)
PYTHON
}
run_dir=$(read_run_dir "$@") || exit 2

job_field() { scontrol show job -o "$SLURM_JOB_ID" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }
newest_checkpoint() { find "$run_dir/checkpoints" -maxdepth 1 -name 'step_*' -printf '%f\n' 2> /dev/null | sort | tail -n 1; }
count_starts() { find "$run_dir/starts" -name '*.json' 2> /dev/null | wc -l; }

# For the account of where the time of the run went.
MEGAGPT_QUEUED_AT=$(date -d "$(job_field SubmitTime)" +%s)
export MEGAGPT_JOB_STARTED_AT MEGAGPT_QUEUED_AT

# A rank that gets a signal before Python has its handlers dies of it. A start is on record once all ranks have joined.
starts_before=$(count_starts)
stop_signal='' forwarded=false srun_pid=''
trap 'stop_signal=USR1' USR1
trap 'stop_signal=TERM' TERM
forward_when_ready() {
  if [ -n "$stop_signal" ] && ! "$forwarded" && [ "$(count_starts)" -gt "$starts_before" ]; then
    say "passing SIG$stop_signal on to the ranks: they save and end"
    kill -s USR1 "$srun_pid" 2> /dev/null # srun passes it on; of SIGTERM it kills the ranks at once
    forwarded=true
  fi
}

# A job that was cancelled must stay so, and a preempted one is requeued by SLURM: only a running one is put back by itself.
back_to_the_queue() {
  if [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    say "goes back to the queue"
    scontrol requeue "$SLURM_JOB_ID" || exit 1
    sleep 60 # the requeue ends this script
  fi
}

tasks=${tasks_per_node:-${SLURM_GPUS_ON_NODE:-1}}
export MASTER_ADDR=${master_addr:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
# Jobs that share a node have different numbers, so different ports; a later start meets no rank that an earlier one left
# behind. Below the range that the kernel hands out.
export MASTER_PORT=$((15000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 15000))
# srun does not take --cpus-per-task over from the job: without this all workers of a rank would share one core.
export SRUN_CPUS_PER_TASK=$((SLURM_CPUS_ON_NODE > tasks ? SLURM_CPUS_ON_NODE / tasks : 1))
export PYTHONUNBUFFERED=1

failures="$run_dir/starts_without_progress"

# check_nodes WHAT...: what the job's nodes say of themselves, one task on each.
check_nodes() {
  timeout --kill-after=20 "$node_check_seconds" srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 "${launch[@]}" "$python" tools/check_node.py "run_dir=$run_dir" "$@" 2>&1
}

# bad_nodes: the job's nodes that do not say in time that they are good. None if all are bad: then it is not the nodes.
bad_nodes() {
  local report good bad
  report=$(check_nodes network=false)
  grep '^check_node: ' <<< "$report" >&2
  good=$(sed -n 's/^check_node: \([^ ]*\) good$/\1/p' <<< "$report")
  if [ -z "$good" ]; then
    say "no node passed the check; its last lines:" >&2
    tail -n 20 <<< "$report" >&2
    if [ "$(grep -c '^check_node: .* bad: .*torch cannot use the GPUs' <<< "$report")" = "$SLURM_JOB_NUM_NODES" ]; then
      return 2
    fi
    return
  fi
  bad=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$good" | paste -sd , -)
  if [ -z "$bad" ] && [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    # This says only that something between the nodes is wrong, not where.
    check_nodes local=false "timeout_seconds=$((node_check_seconds / 2))" | grep '^check_node: .* bad' >&2
  fi
  printf '%s' "$bad"
}

# A running job cannot be moved off a node: another one takes over without it, with the same options, on the same run_dir.
submit_successor() {
  local bad=$1 before options
  shift
  before=$(job_field ExcNodeList)
  [ "$before" = "(null)" ] && before=''
  if [ -n "${MEGAGPT_SBATCH_OPTIONS:-}" ]; then
    read -ra options <<< "$MEGAGPT_SBATCH_OPTIONS"
  else
    options=("--nodes=$SLURM_JOB_NUM_NODES" "--time=$(job_field TimeLimit)" "--partition=$(job_field Partition)")
    local account gpus
    account=$(job_field Account) gpus=$(job_field TresPerNode)
    [ "$account" = "(null)" ] || options+=("--account=$account")
    [ -z "$gpus" ] || options+=("--gres=${gpus/gres:gpu/gpu}")
    [ "$(job_field OverSubscribe)" != NO ] || options+=(--exclusive)
  fi
  say "bad nodes: $bad; a successor without them takes over"
  env -u SLURM_NNODES sbatch "${options[@]}" --exclude="$bad${before:+,$before}" --dependency="afterany:$SLURM_JOB_ID" \
    slurm/pretrain.sh "$@"
}

if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ -e "$failures" ]; then
  bad=$(bad_nodes)
  if [ $? = 2 ]; then
    say "torch cannot use the GPUs of any node: nothing is started (device=cpu trains on CPUs)" >&2
    exit 2
  fi
  if [ -n "$bad" ]; then
    submit_successor "$bad" "$@" && exit 1
    say "the successor could not be submitted: goes on with all nodes" >&2
  fi
fi

seed_compiled
before=$(newest_checkpoint)
say "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, $tasks ranks a node, from ${before:-the beginning}"
# --wait: ranks whose step daemon has died are not waited for when the others have ended.
srun --kill-on-bad-exit=1 --wait=30 --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks" \
  --ntasks=$((tasks * SLURM_JOB_NUM_NODES)) "${launch[@]}" "$python" tools/train_model.py "$@" &
srun_pid=$!
while kill -0 "$srun_pid" 2> /dev/null; do
  sleep 1
  forward_when_ready
done
wait "$srun_pid"
status=$?
keep_compiled
after=$(newest_checkpoint)
say "the ranks ended with status $status, newest checkpoint: ${after:-none}"
if [ "$(job_field Restarts)" != "${SLURM_RESTART_COUNT:-0}" ]; then
  # SLURM had lost this node and started the job elsewhere: what is done from here on is the other start's affair.
  say "a later start of this job runs: nothing more is done here" >&2
  exit 1
fi

case $status in
  0)
    rm -f "$failures"
    exit 0
    ;;
  2)
    exit 2
    ;;
  75)
    rm -f "$failures"
    ;;
  *)
    if [ "$after" != "$before" ]; then rm -f "$failures"; fi
    mkdir -p "$run_dir" && echo "$(date '+%F %T') job $SLURM_JOB_ID status $status" >> "$failures"
    if [ "$(wc -l < "$failures")" -ge "$max_starts_without_progress" ]; then
      say "$max_starts_without_progress starts in a row without a newer checkpoint (see $failures): not started again" >&2
      rm -f "$failures"
      exit 1
    fi
    ;;
esac
back_to_the_queue
exit "$status"
