# shellcheck shell=bash
# Sets up the environment of the jobs in slurm/. Change it for your cluster; `minima submit` uses its cluster file
# instead.
# module load cuda/12.8
# shellcheck disable=SC1091
source .venv/bin/activate
export HF_HUB_OFFLINE=1  # run `minima fetch RECIPE` on the login node first
