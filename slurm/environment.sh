# shellcheck shell=bash
# What the jobs of slurm/ need before Python starts. Change it for your cluster; `minima submit` takes these from its
# cluster file instead.
# module load cuda/12.8
# shellcheck disable=SC1091
source .venv/bin/activate
export HF_HUB_OFFLINE=1  # run `minima fetch RECIPE` on the login node first
