# Kernels that torch.compile and Triton have made lie on each node's own disk, where a thousand ranks can read them at once;
# slurm/pretrain.sh brings them there from one archive on the shared disk, and packs what is new. env.sh names both.
# shellcheck shell=bash disable=SC2154  # env.sh sets the names

# seed_compiled: on every node make compiled_here, readable by its owner only since it holds code, and fill an empty one.
seed_compiled() {
  # shellcheck disable=SC2016  # expanded on the node
  local on_a_node='mkdir -p -m 700 "$2" && [ -O "$2" ] || exit 3
    [ ! -f "$1" ] || [ -n "$(ls -A "$2")" ] || tar -xf "$1" -C "$2"'
  srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    bash -c "$on_a_node" - "$compiled_archive" "$compiled_here" && return
  say "$compiled_here could not be filled on every node, or is another user's: kernels are compiled anew" >&2
}

# keep_compiled: pack this node's kernels for later jobs if one is newer than the archive.
keep_compiled() {
  [ -d "$compiled_here" ] || return 0
  local newer=()
  [ ! -f "$compiled_archive" ] || newer=(-newer "$compiled_archive")
  [ -n "$(find "$compiled_here" -type f "${newer[@]}" -print -quit)" ] || return 0
  mkdir -p "$(dirname "$compiled_archive")"
  if tar -cf "$compiled_archive.$SLURM_JOB_ID" -C "$compiled_here" . && mv -f "$compiled_archive.$SLURM_JOB_ID" "$compiled_archive"; then
    return 0
  fi
  rm -f "$compiled_archive.$SLURM_JOB_ID"
  say "$compiled_archive could not be written: later jobs compile anew" >&2
}
