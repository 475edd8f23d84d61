#!/bin/bash
# Installs MegaGPT's dependencies. The Dockerfile, the Makefile and CI all install through this file.
#
#   docker/install.sh packages TARGET          Debian packages (as root)
#   docker/install.sh python TARGET [VENV]     Python packages at the versions of constraints.txt, into VENV (default .venv)
#
# TARGET: corpus (the data tools; no torch), train (the trainer), dev (both, and what the tests use).
# PYTHON names the interpreter; without it the first Python 3.11 or 3.12 found is taken.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "docker/install.sh: $*" >&2
  exit 2
}

# What the Python packages need from the system (python3-venv where Debian's own Python is used), and per target what the
# tools call: a C++ compiler for torch.compile, the libraries by which NCCL reaches InfiniBand (without them it takes TCP), git for the
# commit in a run's record, SLURM and shellcheck for the tests.
install_packages() {
  local names=(ca-certificates make)
  case $1 in
    corpus) ;;
    train) names+=(gcc g++ libc6-dev git ibverbs-providers libibverbs1 librdmacm1) ;;
    dev) names+=(gcc g++ libc6-dev git munge shellcheck slurm-client slurmctld slurmd) ;;
  esac
  [ "$(id -u)" = 0 ] || fail "installing packages needs root (packages: ${names[*]})"
  if [[ $(command -v python3 || true) == /usr/bin/python3 ]]; then names+=(python3-venv python3-dev); fi
  # A package's daemon must not start: the tests start their own on 127.0.0.1. dpkg asks this file.
  local policy=/usr/sbin/policy-rc.d made=false
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
    made=true
  fi
  export DEBIAN_FRONTEND=noninteractive
  local status=0
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${names[@]}"; } || status=$?
  if "$made"; then rm -f "$policy"; fi
  return "$status"
}

fitting() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null
}

find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    fitting "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 or 3.12 with the venv module"
    echo "$PYTHON"
    return
  fi
  for name in python3 python3.11 python3.12; do
    if command -v "$name" > /dev/null && fitting "$name"; then
      echo "$name"
      return
    fi
  done
  fail "no Python 3.11 or 3.12 with the venv module found (on Debian: apt-get install python3-venv; or set PYTHON=...)"
}

install_python() {
  local target=$1 venv=$2 python
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint "$root/constraints.txt")
  cd "$root"
  # torch first and alone: the largest piece, and nothing later may bring another build of it.
  if [ "$target" != corpus ]; then
    echo "installing torch"
    "${pip[@]}" torch
  fi
  echo "installing megagpt[$target]"
  "${pip[@]}" --editable ".[$target]"
  "$venv/bin/python" -m pip --disable-pip-version-check check
}

[ $# -ge 2 ] || fail "usage: docker/install.sh packages|python corpus|train|dev [VENV]"
case $2 in corpus | train | dev) ;; *) fail "no such target: $2 (corpus, train or dev)" ;; esac
case $1 in
  packages) install_packages "$2" ;;
  python) install_python "$2" "${3:-$root/.venv}" ;;
  *) fail "no such step: $1 (packages or python)" ;;
esac
