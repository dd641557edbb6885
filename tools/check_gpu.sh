#!/usr/bin/env bash
# Runs everything that needs a GPU within a given time: first tests/gpu, doctor and the quickstart at the same time
# (none of them measures times), then the measurements one after another. Logs and JSONs go to a folder; the last lines
# of output say how each step ended. A step that runs out of time is ended or skipped, and reported as such.
#
#   tools/check_gpu.sh [-s SECONDS] [-o FOLDER] [STEP...]
#
#   -s SECONDS   for all of them; 3600 by default
#   -o FOLDER    default: runs/gpu
#   STEP         tests doctor quickstart | walls step compiled offload loss checkpoints; all by default.
#                Measurements run in the given order.
set -euo pipefail

seconds=3600 output=runs/gpu
while getopts s:o:h option; do
    case $option in
        s) seconds=$OPTARG ;;
        o) output=$OPTARG ;;
        h) sed -n 's/^# \{0,1\}//p' "$0" | sed 1d && exit 0 ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "-s takes whole seconds, not '$seconds'" >&2 && exit 2; }
[[ $# -gt 0 ]] || set -- tests doctor quickstart walls step compiled offload loss checkpoints

mkdir -p "$output"
output=$(realpath "$output")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[[ -x .venv/bin/python && -z ${PYTHON:-} ]] && python=.venv/bin/python
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

"$python" -c 'import sys; from minima.launcher import num_accelerators; sys.exit(not num_accelerators())' || {
    echo "no GPU is visible on this machine, so every test would be skipped: run it on a machine with one" >&2
    exit 2
}

bench=("$python" tools/bench_distil.py --turns 1)
command_of() { # sets `command` to what a step runs
    case $1 in
        tests) command=("$python" -m pytest tests/gpu -n 5 -k "not walls" -p no:cacheprovider -rf --tb=short) ;;
        doctor) command=("$python" -m minima doctor) ;;
        quickstart) command=("$python" -m minima run quickstart "output=$output/quickstart") ;;
        walls) command=("$python" -m pytest tests/gpu -k walls -p no:cacheprovider -rf --tb=short) ;;
        step) command=("${bench[@]}" --profile gpu-7b-3b --only "b:minima bfloat16,b:original" --steps 3
            --largest "b:minima bfloat16=6,b:original bfloat16=3" --kernels 40 --output "$output/step.json") ;;
        compiled) command=("${bench[@]}" --profile gpu-7b-3b --only b:minima_compiled --steps 3
            --largest "b:minima_compiled bfloat16=6" --kernels 40 --output "$output/compiled.json") ;;
        offload) command=("${bench[@]}" --profile gpu-7b-3b-offload --steps 1 --output "$output/offload.json") ;;
        loss) command=("${bench[@]}" --profile gpu-7b-3b --only loss: --output "$output/loss.json") ;;
        checkpoints) command=("$python" tools/bench_checkpoint.py --width 1024 --layers 12 --sequences 4
            --sequence-tokens 2048 --precision bfloat16 --steps 40 --every 40 --rounds 2) ;;
        *) echo "there is no step '$1': see $0 -h" >&2 && exit 2 ;;
    esac
}

started=$SECONDS
attempt() { # runs one step within the remaining time, and writes its exit code to FOLDER/STEP.code
    local command left=$((seconds - (SECONDS - started))) code=0
    command_of "$1"
    if ((left < 10)); then
        echo "no time left" >"$output/$1.code"
        return
    fi
    timeout --signal=TERM --kill-after=10 "$((left - 5))" "${command[@]}" >"$output/$1.log" 2>&1 || code=$?
    ((code != 124 && code != 137)) || code="ended: no time left"
    echo "$code" >"$output/$1.code"
    echo "[$((SECONDS - started)) s] $1: $code"
}

for step in "$@"; do
    (command_of "$step") || exit 2
    rm -f "$output/$step.code" "$output/$step.log"
done
for step in "$@"; do
    case $step in tests | doctor | quickstart) attempt "$step" & ;; esac
done
wait
for step in "$@"; do
    case $step in tests | doctor | quickstart) ;; *) attempt "$step" ;; esac
done

failed=0
for step in "$@"; do
    printf '\n== %s: %s\n' "$step" "$(cat "$output/$step.code")"
    [[ "$(cat "$output/$step.code")" == 0 ]] || failed=1
    [[ ! -s $output/$step.log ]] || { grep -v '^$' "$output/$step.log" | tail -n 25 | cut -c -200; } || true
done
exit "$failed"
