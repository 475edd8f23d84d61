#!/bin/bash
#SBATCH --job-name=megagpt-serve
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=megagpt-serve-%j.log
# Serves a model on one GPU of a node, until the job's time ends or it is cancelled: then running requests are finished.
#
#   slurm/serve.sh export=FOLDER [key=value ...]                     submits itself with env.sh's options
#   sbatch [options] slurm/serve.sh run_dir=RUN [key=value ...]      the same, from the project's root
#
# Without words it serves what env.sh names (serve_words). The log names the node and how to reach the server from outside:
# it listens on 127.0.0.1 of its node; another host= needs API keys (tools/serve_model.py --help).
set -uo pipefail

say() { printf '%s serve.sh: %s\n' "$(date '+%F %T')" "$*"; }

fail() {
  say "$*" >&2
  exit 2
}

# Under sbatch this file is a copy in SLURM's spool, without its neighbours; run directly it is beside env.sh.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
if [ -f "$here/env.sh" ]; then in_job=false root=$(dirname "$here"); else in_job=true root=${SLURM_SUBMIT_DIR:-}; fi
[ -f "$root/tools/serve_model.py" ] || fail "no project at '$root': submit from the project's root, or run slurm/serve.sh directly"
cd "$root" || exit 2
# shellcheck source=slurm/env.sh
source slurm/env.sh
# shellcheck source=slurm/resubmit.sh
source slurm/resubmit.sh
[ $# -ge 1 ] || set -- "${serve_words[@]}"
[ $# -ge 1 ] || fail "usage: slurm/serve.sh run_dir=RUN|export=FOLDER [key=value ...]"

if ! "$in_job"; then
  # Wrong settings are found before anything waits in the queue.
  "${launch[@]}" "$python" tools/serve_model.py "$@" --print > /dev/null || exit 2
  export MEGAGPT_SBATCH_OPTIONS="${site_options[*]} ${serve_options[*]}"
  exec sbatch "${site_options[@]}" "${serve_options[@]}" slurm/serve.sh "$@"
fi

[ -n "${SLURM_JOB_ID:-}" ] || fail "not inside a SLURM job, and not beside env.sh"
resubmit_if_plain slurm/serve.sh "${site_options[@]}" "${serve_options[@]}" -- "$@"

port=8000
for word in "$@"; do [[ $word != port=* ]] || port=${word#port=}; done
node=$(hostname)
say "on $node; from outside: ssh -N -L $port:127.0.0.1:$port $node, then http://127.0.0.1:$port"

# The time limit and preemption reach this script, scancel the step: both end in SIGTERM for the server, which drains. The
# step is asked, as srun, when it gets SIGTERM itself, kills it at once.
trap 'say "the job ends: draining"; scancel --signal=TERM "$SLURM_JOB_ID.0" 2> /dev/null' USR1 TERM
export PYTHONUNBUFFERED=1 SRUN_CPUS_PER_TASK=${SLURM_CPUS_ON_NODE:-1}
srun --nodes=1 --ntasks=1 "${launch[@]}" "$python" tools/serve_model.py "$@" &
server=$!
# A trapped signal ends `wait` early; the last one gives the server's own status.
while kill -0 "$server" 2> /dev/null; do wait "$server"; done
wait "$server"
status=$?
say "the server ended with status $status"
exit "$status"
