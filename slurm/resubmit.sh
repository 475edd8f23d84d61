# Both job scripts source this file: what a plain `sbatch slurm/....sh` lacks comes from env.sh.
# shellcheck shell=bash

# missing_resources OPTIONS...: what this job has less of than env.sh's options ask for; nothing if it has enough.
missing_resources() {
  local options=" $* " nodes
  [ -z "${SLURM_ARRAY_TASK_COUNT:-}" ] || return 0 # every task of an array has one node
  if [[ $options == *gpu* ]] && [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] && [ -z "${SLURM_JOB_GPUS:-}" ]; then
    echo "no GPUs"
    return 0
  fi
  nodes=$(sed -nE 's/.* (--nodes[= ]|-N ?)([0-9]+).*/\2/p' <<< "$options")
  if [ "${SLURM_JOB_NUM_NODES:-1}" -lt "${nodes:-1}" ]; then
    echo "$SLURM_JOB_NUM_NODES of $nodes nodes"
  fi
}

# resubmit_if_plain SCRIPT OPTIONS... -- [CONFIG key=value ...]: if this job was submitted without options and lacks what env.sh
# asks for, submit it once more with these options, and end. A job with options of its own and fewer nodes: resubmit=no.
resubmit_if_plain() {
  local script=$1 options=() missing submitted
  shift
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  [ -z "${MEGAGPT_SBATCH_OPTIONS:-}" ] && [ "${resubmit:-yes}" = yes ] || return 0
  missing=$(missing_resources "${options[@]}")
  [ -n "$missing" ] || return 0
  # Without this job's own variables, some of which sbatch takes for options.
  submitted=$(
    for name in $(compgen -e SLURM_); do [ "$name" = SLURM_CONF ] || unset "$name"; done
    MEGAGPT_SBATCH_OPTIONS="${options[*]}" sbatch "${options[@]}" "$script" "$@"
  ) || fail "this job has $missing, and could not be submitted again with slurm/env.sh's options (${options[*]})"
  say "this job has $missing: submitted again with slurm/env.sh's options (${options[*]}): $submitted; this one ends"
  exit 0
}
