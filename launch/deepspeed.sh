#!/usr/bin/env bash
# Starts the ranks of stages with the deepspeed launcher, on this machine or on those of a host file.
#   launch/deepspeed.sh RECIPE [--stages a,b] [key.path=value ...]
# MINIMA_RANKS: ranks on this machine; by default one for each GPU, or two without a GPU.
# MINIMA_HOSTFILE: machines, a line `HOST slots=N` each, with a rank for each slot. They are reached through
# MINIMA_DEEPSPEED_LAUNCHER: pdsh (ssh, the default), openmpi, or slurm (inside a job); MINIMA_DEEPSPEED_LAUNCHER_ARGS:
# options of that program. MASTER_ADDR and MASTER_PORT: set them if the others know the first host by another name.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
export PYTHONUTF8=${PYTHONUTF8:-1}  # PyTorch reads its own source files in the locale's encoding

fail() { printf '%s\n' "$*" >&2; exit 2; }

refuse_for_shells() { # deepspeed gives its folder and arguments to the machines' shells, and quotes only words with spaces
  local word here
  here=$(pwd -P)
  [[ $here != *' '* ]] || fail "$here: pdsh would split this folder's name at its spaces: $1"
  for word in "$here" "${@:2}"; do
    if [[ $word == *[\$\`\\$'\n\t']* || ($word != *' '* && $word == *[\;\&\|\<\>\(\)\'\"]*) ||
      ($word != *' '* && $word == *\{*,*\}*) ]]; then
      fail "$word: the shells that pdsh starts would read more than text in it: $1"
    fi
  done
}

over_hosts() { # sets `command` for the machines of MINIMA_HOSTFILE
  local by=${MINIMA_DEEPSPEED_LAUNCHER:-pdsh} more=${MINIMA_DEEPSPEED_LAUNCHER_ARGS:-} hosts other program names name own file
  # If the file could not be read, deepspeed would run on this machine only.
  [ -r "$MINIMA_HOSTFILE" ] || fail "MINIMA_HOSTFILE=$MINIMA_HOSTFILE cannot be read"
  hosts=$(grep -vE '^[[:space:]]*(#|$)' "$MINIMA_HOSTFILE" || true)
  [[ $hosts =~ ^([^[:space:]]+)[[:space:]]+slots=[0-9]+ ]] ||
    fail "MINIMA_HOSTFILE=$MINIMA_HOSTFILE has no line like \`HOST slots=8\`"
  address=${MASTER_ADDR:-${BASH_REMATCH[1]}} port=${MASTER_PORT:-$port}
  # pdsh's shells on the machines read it
  [[ $address =~ ^[A-Za-z0-9_][A-Za-z0-9_.:%-]*$ ]] || fail "$address is not the name or address of a machine"
  other=$(grep -vE "slots=${MINIMA_RANKS:-[0-9]+}([[:space:]]|\$)" <<<"$hosts" || true)
  [ -z "$other" ] || fail "MINIMA_RANKS=${MINIMA_RANKS:-}, but $MINIMA_HOSTFILE says otherwise: ${other//$'\n'/, }"
  case $by in
    pdsh)
      program=pdsh
      refuse_for_shells "change it, or set MINIMA_DEEPSPEED_LAUNCHER=openmpi" "$@"
      ;;
    openmpi) program=mpirun ;;
    slurm) program=srun ;;
    *) fail "MINIMA_DEEPSPEED_LAUNCHER=$by: it must be pdsh, openmpi or slurm" ;;
  esac
  command -v "$program" >/dev/null ||
    fail "MINIMA_DEEPSPEED_LAUNCHER=$by needs $program, which is not installed: install it, or use launch/mpirun.sh"
  start=(--module minima)
  case $by in
    openmpi)
      more="--bind-to none $more"
      # By default deepspeed asks for eth0. Any interface will do: the ranks do not communicate through MPI.
      [[ $more == *btl_tcp_if_include* ]] || more="--mca btl_tcp_if_include lo $more"
      [ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
      export MASTER_ADDR=$address MASTER_PORT=$port
      ;;
    slurm)
      [ -n "${SLURM_JOB_ID:-}" ] || fail "MINIMA_DEEPSPEED_LAUNCHER=slurm works only inside a Slurm job"
      more="--kill-on-bad-exit=1 $more"
      start=("$(command -v minima)") # deepspeed's srun command is `python FILE`, so it cannot start a module
      ;;
  esac
  # Variables reach other machines through a deleted file that the open descriptor keeps alive, because tokens on a
  # command line would show in process lists.
  names='DS_ACCELERATOR|HF_(HOME|HUB_OFFLINE|HUB_CACHE|DATASETS_.*|ENDPOINT)|MASTER_(ADDR|PORT)|MINIMA_(DRIVER|TERMINAL)'
  names+='|OMP_NUM_THREADS|PYTHONUTF8|TOKENIZERS_PARALLELISM|TORCH_EXTENSIONS_DIR|LD_LIBRARY_PATH|(NCCL|GLOO)_.*'
  own=${DS_ENV_FILE:-.deepspeed_env} file=$(mktemp)
  grep -hs = ~/"$own" "$own" >"$file" || true # the user's own variables, which deepspeed would have read
  while read -r name; do
    printf '%s=%s\n' "$name" "${!name}" >>"$file"
  done < <(compgen -e | grep -xE "$names")
  unset "${!MLFLOW@}" # deepspeed would pass them on, including MLFLOW_TRACKING_TOKEN
  exec 9<"$file"
  rm "$file"
  export DS_ENV_FILE=/dev/fd/9
  where=(--hostfile "$MINIMA_HOSTFILE" --force_multi --launcher "$by" "--launcher_args=$more" --no_ssh_check
    --master_addr "$address")
}

[[ ${MINIMA_RANKS:-1} =~ ^[1-9][0-9]*$ ]] || fail "MINIMA_RANKS=$MINIMA_RANKS is not a number of ranks"
port=$(python -c 'from minima.launcher import free_port; print(free_port())')
if [ -n "${MINIMA_HOSTFILE:-}" ]; then
  over_hosts "$@"
else
  [ -z "${MINIMA_DEEPSPEED_LAUNCHER:-}" ] || fail "MINIMA_DEEPSPEED_LAUNCHER=$MINIMA_DEEPSPEED_LAUNCHER without" \
    "MINIMA_HOSTFILE: it says how other machines are reached, and the file says which"
  address=127.0.0.1 start=(--module minima)
  ranks=${MINIMA_RANKS:-$(python -c 'from minima.launcher import default_ranks; print(default_ranks())')}
  where=(--num_gpus "$ranks" --master_addr "$address")
  visible=${CUDA_VISIBLE_DEVICES:-}
  visible=${visible// /}
  visible=${visible%%,-*}  # CUDA ignores everything from the first negative entry on
  if [[ -n $visible && $visible != -* && $visible != NoDevFiles && ${DS_ACCELERATOR:-} != cpu ]]; then
    # With --num_gpus, deepspeed ignores CUDA_VISIBLE_DEVICES and uses the first GPUs of the machine.
    [[ $visible =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "the deepspeed launcher knows GPUs by number only, not" \
      "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: use launch/torchrun.sh"
    count=$(tr -cd , <<<"$visible" | wc -c)
    [ "$ranks" -le $((count + 1)) ] ||
      fail "$ranks ranks on the $((count + 1)) GPUs of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
    where=(--include "localhost:$(cut -d, -f"1-$ranks" <<<"$visible")" --master_addr "$address")
  fi
fi
unset RANK WORLD_SIZE LOCAL_RANK  # from another launcher; this one sets them for its ranks
command=(deepspeed "${where[@]}" --master_port "$port" --no_local_rank --log_level error "${start[@]}" stage "$@")
printf '+'; printf ' %q' "${command[@]}"; printf '\n'
exec "${command[@]}"
