# shellcheck shell=bash
# How a job runs one stage: starts its ranks with srun, and requeues after the time limit, a preemption or a lost node.
#   source slurm/run_stage.sh
#   run_stage RUN_FOLDER STAGE COMMAND...    on every rank of the job
#   run_alone RUN_FOLDER STAGE COMMAND...    in a single process: data, vocabularies and benchmarks
# `minima submit` copies this text into its scripts, so that a new version of minima does not change waiting jobs.
#
# Signals (no exit code makes Slurm requeue a job, and a SIGTERM to srun would kill the ranks before they save):
#   USR1 to this shell, sent before the time limit because of #SBATCH --signal=B:USR1@SECONDS: the ranks get SIGTERM and
#     save at the end of their next step; then the job is requeued under the same id, so that dependent jobs keep
#     waiting.
#   A preemption with a grace time: Slurm sends SIGTERM to the ranks only; once they have saved, the job is requeued, by
#     Slurm itself if it does that.
#   SIGTERM to this shell (scancel; or a preemption without a grace time, which Slurm requeues): the ranks only save.
#     `minima cancel` sends it to this shell only, so that the save may take longer than Slurm's KillWait.
# If Slurm loses a node, it requeues the job itself. If ranks fail before Slurm notices, because the node is gone, has
# rebooted or was drained by a health check, the job is requeued here.
# Optional settings, to be made before sourcing this file:
#   srun_options=(...)   further options for srun, such as --container-image
#   max_requeues=N       fail instead of requeueing once the job has been restarted N times

job=${SLURM_JOB_ID:?run_stage.sh must run inside an sbatch job}
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  # A job submitted by hand from the shell of an array's task inherits that task's place in its array.
  array=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}
  shown=$(scontrol show job --oneliner "$array" 2>/dev/null) || shown=''
  [ -n "$shown" ] && [[ " $shown " != *" JobId=$job "* ]] || job=$array
  unset array shown
fi
declare -a srun_options
unset RANK WORLD_SIZE LOCAL_RANK  # from a launcher that the job was submitted from; the ranks use srun's variables
unset "${!SQUEUE_@}" "${!SCANCEL_@}"  # default options that could hide jobs, or keep signals from the ranks
# These are set by an srun for its task; a user's own settings for srun come without a _TYPE variable.
[ -z "${SLURM_CPU_BIND_TYPE+x}" ] || unset "${!SLURM_CPU_BIND@}"
[ -z "${SLURM_MEM_BIND_TYPE+x}" ] || unset "${!SLURM_MEM_BIND@}"
export SLURM_TIME_FORMAT=standard  # times are compared here, so the user's preferred format must not apply
export PYTHONUNBUFFERED=1 PYTHONUTF8=${PYTHONUTF8:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# Only up to Slurm 22.04 does srun take the number of cores per rank from the job; later versions would use one.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
compgen -G '/dev/nvidia[0-9]*' >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

say() { printf '%s job %s: %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$job" "$*"; }

job_is() { # job_is FIELD PATTERN: whether scontrol shows FIELD=PATTERN for this job
  scontrol show job --oneliner "$job" 2>/dev/null | grep -E "(^| )$1=$2( |\$)" >/dev/null # -q would break the pipe
}

is_preempted() { job_is JobState '[A-Z]*RUNNING' && job_is PreemptTime '[0-9]+[^ ]*'; }

requeues_preempted() { # whether Slurm itself requeues a job that ends within its grace time (since 24.11)
  local version
  version=$(scontrol --version 2>/dev/null) || return 1
  [[ $version =~ ([0-9]+)[.]([0-9]+) ]] && [ "${BASH_REMATCH[1]}${BASH_REMATCH[2]}" -ge 2411 ] && job_is Requeue 1 &&
    scontrol show config 2>/dev/null | grep -E '^PreemptType *= *preempt/partition_prio' >/dev/null &&
    scontrol show partition "${SLURM_JOB_PARTITION:-}" 2>/dev/null | grep 'PreemptMode=REQUEUE' >/dev/null
}

was_told() { # whether Slurm has already sent SIGTERM to the ranks: a second one would end them at once
  # `return` without a number would give the status from before the trap
  job_is JobState '(COMPLETING|CANCELLED|PENDING|REQUEUED|PREEMPTED|TIMEOUT|NODE_FAIL)[^ ]*' && return 0
  is_preempted && ! scontrol show config 2>/dev/null | grep '^PreemptParameters.*send_user_signal' >/dev/null
}

tell_ranks() { # send SIGTERM to every rank, once; never through srun, which would react by killing them
  [ -z "$told" ] || return 0
  was_told || scancel --signal=TERM "$job" || {
    say "the ranks could not be signalled"
    return 0
  }
  told=yes
}

on_usr1() {
  interrupted=yes leave=yes
  say "told to leave (time limit or preemption); the ranks save"
  tell_ranks
}

on_term() {
  interrupted=yes ended=yes
  say "told to end; the ranks save"
  tell_ranks
}

lost_node() { # the first node of this job that Slurm has lost or taken out of service, or that has since rebooted
  local line state=' State=[^ ]*([*]|DOWN|DRAIN|FAIL)' started=' SlurmdStartTime=([0-9T:-]+)'
  while read -r line; do
    [[ $line =~ $state ]] ||
      [[ $line =~ $started && $(date -d "${BASH_REMATCH[1]}" +%s) -gt $began ]] || continue
    line=${line#NodeName=}
    printf '%s\n' "${line%% *}"
    break
  done < <(scontrol show node --oneliner "${SLURM_JOB_NODELIST:-}" 2>/dev/null)
}

progress_of() { # what a later start can resume from: checkpoints, finished stages, scores, benchmark tasks and answers
  find "$1" -maxdepth 6 \( -name checkpoint.json -o -name manifest.json -o -name scores.safetensors -o \
    -name 'reference-*' -o -name results.json -o -name '*.answered' \) -printf '%p %s\n' 2>/dev/null | sort || true
}

requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${max_requeues:-1000000}" ]; then
    say "already restarted ${SLURM_RESTART_COUNT:-0} times, the maximum: not requeued"
  elif [ -n "$leave" ] && [ "$before" = "$(progress_of "$run")" ] && ! is_preempted; then
    say "nothing new was saved before the time limit, so another start would fail too: not requeued; give it more time"
  elif is_preempted && requeues_preempted; then # a further request would requeue it once more, even after success
    say "preempted; Slurm requeues it, and it resumes from what is saved"
  elif scontrol requeue "$job"; then
    say "requeued; it resumes from what is saved"
  else
    say "it could not be requeued: submit it again to resume"
  fi
}

cancel() { # after a SIGTERM from `minima cancel` and not from Slurm: a plain scancel would wait only KillWait seconds
  say "cancelled; submit it again to resume from what is saved"
  scancel "$job" || true
}

as_path() { # the folder, written so that no program mistakes it for an option or an expression
  case $1 in
    [A-Za-z0-9_./]*) printf '%s' "$1" ;;
    *) printf './%s' "$1" ;;
  esac
}

run_job() { # run_job RUN_FOLDER COMMAND...: run a command, and requeue the job if it can resume
  local code=0 child node=''
  run=$(as_path "$1")
  shift
  before=${before-$(progress_of "$run")}
  say "start ${SLURM_RESTART_COUNT:-0} on ${SLURM_JOB_NODELIST:-}"
  (printf '+' && printf ' %q' "$@" && printf '\n')
  if [ -n "$leave$ended" ]; then # signalled before the command was started
    code=143
  else
    "$@" &
    child=$!
    while :; do # a trap ends `wait` early
      code=0
      wait $child || code=$?
      [ -n "$interrupted" ] || break
      interrupted=''
    done
  fi
  case $code in
    0 | 2) ;;
    *) [ -n "$ended" ] || node=$(lost_node) ;;
  esac
  case ${node:+lost}$code in
    0) ;;
    lost*)
      say "ended with exit code $code; node $node was lost or drained meanwhile"
      leave='' # if nothing new was saved, it is the node's fault
      requeue
      ;;
    1 | 2 | 4) say "failed with exit code $code" ;; # internal error, user's mistake, hung rank: not the cluster's fault
    *)
      say "ended with exit code $code"
      if [ -n "$ended" ]; then
        is_preempted || ! job_is JobState RUNNING || cancel
      elif [ -n "$leave" ] || is_preempted; then
        requeue
      fi
      ;;
  esac
  return "$code"
}

run_step() { # run_step RUN_FOLDER STAGE SRUN_OPTIONS... -- COMMAND...
  local folder stage=$2 options=()
  folder=$(as_path "$1")
  shift 2
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  mkdir -p "$folder/logs"
  run_job "$folder" srun --kill-on-bad-exit=1 --export=ALL --open-mode=append \
    --output="${folder//%/%%}/logs/$stage-$job-rank%t.log" "${srun_options[@]}" "${options[@]}" "$@"
}

run_stage() { run_step "$1" "$2" -- "${@:3}"; }

run_alone() { run_step "$1" "$2" --nodes=1 --ntasks=1 -- "${@:3}"; }

told='' leave='' ended='' interrupted='' began=$(date +%s)
trap on_usr1 USR1
trap on_term TERM
