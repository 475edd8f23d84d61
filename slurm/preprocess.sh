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
#   sbatch slurm/preprocess.sh                                     the words and options that env.sh names
#   stages="filter_documents dedup_documents" slurm/preprocess.sh ...    only some of the stages
#   executor=dask slurm/preprocess.sh ...                          one pool of workers over all nodes, by Dask
#   stages=extract_documents sbatch --array=0-63 slurm/preprocess.sh ...    one stage, each task its part
#
# Otherwise each node works on its part of a stage (part=i/n) with a worker per core. Some stages have phases that need all
# parts of the phase before: over several nodes they are run until their summary says that they are complete; an array is
# submitted again until then. With Dask nodes share one queue, so a lost node costs only what it was at work on. What is
# committed stays, so a job that was preempted or ran into its time limit goes on where it was. A stage that fails ends the
# job and names the stage.
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
# shellcheck source=slurm/resubmit.sh
source slurm/resubmit.sh
[ $# -ge 1 ] || set -- "${preprocess_words[@]}"
[ $# -ge 1 ] || fail "usage: slurm/preprocess.sh CONFIG [key=value ...]"
settings=$("${launch[@]}" "$python" tools/extract_documents.py "$@" --print) || exit 2
work_dir=$("${launch[@]}" "$python" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["work_dir"])' <<< "$settings")
executor=${executor:-process}
case $executor in process | dask) ;; *) fail "executor=$executor: process or dask is expected" ;; esac
if [ -n "${SLURM_ARRAY_TASK_COUNT:-}" ]; then
  [ "$executor" = process ] || fail "executor=dask is for one job of many nodes, not for an array"
  case ${stages:-all} in *' '* | all) fail "an array runs one stage: stages=extract_documents sbatch --array=... (the next one with --dependency=afterok:...)" ;; esac
  [ "$stages" != train_tokenizer ] || fail "train_tokenizer is one task: submit it without --array"
  [ $((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1)) = "$SLURM_ARRAY_TASK_COUNT" ] \
    || fail "--array: task numbers must follow each other: submit all of them again, those with nothing left to do end at once"
fi

if ! "$in_job"; then
  # Dask goes on without a node that is lost; otherwise SLURM shall put the job back.
  if [ "$executor" = dask ]; then preprocess_options+=(--no-kill); fi
  export MEGAGPT_SBATCH_OPTIONS="${site_options[*]} ${preprocess_options[*]}"
  exec sbatch "${site_options[@]}" "${preprocess_options[@]}" slurm/preprocess.sh "$@"
fi

[ -n "${SLURM_JOB_ID:-}" ] || fail "not inside a SLURM job, and not beside env.sh"
resubmit_if_plain slurm/preprocess.sh "${site_options[@]}" "${preprocess_options[@]}" -- "$@"
export PYTHONUNBUFFERED=1 SRUN_CPUS_PER_TASK=$SLURM_CPUS_ON_NODE

stopping=false stage_pid='' dask_pids=()
trap 'stopping=true; kill "$stage_pid" 2> /dev/null' USR1

# attend COMMAND...: its status, with traps answered meanwhile.
attend() {
  "$@" &
  stage_pid=$!
  while kill -0 "$stage_pid" 2> /dev/null; do sleep 1; done # traps run between the sleeps
  wait "$stage_pid"
}

# run_on N COMMAND...: one task on each of N nodes; the tasks' status.
run_on() {
  local nodes=$1
  shift
  attend srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 "$@"
}

on_all_nodes() {
  # shellcheck disable=SC2016  # each task fills in its own number
  run_on "$SLURM_JOB_NUM_NODES" bash -c '"$@" "part=$SLURM_PROCID/$SLURM_NTASKS" "num_workers=$SLURM_CPUS_ON_NODE"' part "$@"
}

# A scheduler beside this script and a worker per core on every node. They talk TLS with a key made for this job: a Dask worker
# runs whatever it is sent. Files of keys and of the scheduler's address are readable by the owner alone.
start_dask() {
  local folder=$PWD/runs/dask/$SLURM_JOB_ID
  rm -rf "$folder"
  (umask 077 && mkdir -p "$folder" && openssl req -x509 -newkey rsa:2048 -nodes -days 90 -subj /CN=megagpt-corpus \
    -keyout "$folder/key.pem" -out "$folder/certificate.pem" 2> /dev/null) || fail "openssl could not make a key in $folder"
  local prefix=DASK_DISTRIBUTED__COMM__TLS role
  export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=True "${prefix}__CA_FILE=$folder/certificate.pem"
  for role in SCHEDULER WORKER CLIENT; do
    export "${prefix}__${role}__CERT=$folder/certificate.pem" "${prefix}__${role}__KEY=$folder/key.pem"
  done
  scheduler_file=$folder/scheduler.json
  "${launch[@]}" "$python" -m distributed.cli.dask_scheduler --protocol tls --port 0 --no-dashboard --no-show \
    ${dask_host:+--host "$dask_host"} --scheduler-file "$scheduler_file" > "$folder/scheduler.log" 2>&1 &
  dask_pids=($!)
  # A node that is lost takes its workers with it, not the others.
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --no-kill --wait=0 \
    --output "$folder/workers-%n.log" "${launch[@]}" "$python" -m distributed.cli.dask_worker --protocol tls --no-dashboard \
    ${dask_host:+--host "$dask_host"} --nworkers "$SLURM_CPUS_ON_NODE" --nthreads 1 --local-directory /tmp \
    --death-timeout 300 --scheduler-file "$scheduler_file" &
  dask_pids+=($!)
  local waited
  for ((waited = 0; waited < 300; waited++)); do
    [ -s "$scheduler_file" ] && grep -q 'Registered to' "$folder"/workers-*.log 2> /dev/null && return
    kill -0 "${dask_pids[0]}" 2> /dev/null || break
    sleep 1
  done
  fail "Dask did not start: see $folder"
}

# is_complete STAGE: all parts of it, by its summary.
is_complete() {
  local folder=${1%_documents}
  [ "$folder" != tokenize ] || folder=shards
  grep -q '"complete": true' "$work_dir/$folder/summary.json" 2> /dev/null
}

end_dask() { [ ${#dask_pids[@]} = 0 ] || kill "${dask_pids[@]}" 2> /dev/null; }

if [ "$executor" = dask ]; then
  start_dask
  trap end_dask EXIT
fi
for stage in ${stages:-extract_documents filter_documents dedup_documents train_tokenizer tokenize_documents}; do
  say "$stage on $SLURM_JOB_NODELIST"
  command=("${launch[@]}" "$python" "tools/$stage.py" "$@")
  for ((round = 1; round <= 10; round++)); do # deduplication has the most phases, seven and writing
    if [ "$stage" = train_tokenizer ] && [ "$executor" = dask ]; then
      attend "${command[@]}" # beside the scheduler: the workers' step has the nodes, another one would wait for ever
    elif [ "$stage" = train_tokenizer ]; then
      run_on 1 "${command[@]}"
    elif [ "$executor" = dask ]; then
      attend "${command[@]}" executor=dask "scheduler_file=$scheduler_file"
    elif [ -n "${SLURM_ARRAY_TASK_COUNT:-}" ]; then
      part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT
      run_on 1 "${command[@]}" "part=$part" "num_workers=$SLURM_CPUS_ON_NODE"
    else
      on_all_nodes "${command[@]}"
    fi
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
    if [ -n "${SLURM_ARRAY_TASK_COUNT:-}" ]; then
      is_complete "$stage" || say "$stage has other parts, or phases to come: submit the array again when all its tasks have ended"
      break
    fi
    if [ "$stage" = train_tokenizer ] || [ "$SLURM_JOB_NUM_NODES" = 1 ] || [ "$executor" = dask ] || is_complete "$stage"; then break; fi
  done
  [ "$round" -le 10 ] || fail "$stage is not complete after 10 rounds: see $work_dir"
done
say "complete"
