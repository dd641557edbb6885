#!/usr/bin/env bash
# Submits MiniChat-3B: a job for each unfinished stage, which starts after the one before it has succeeded.
#   slurm/minichat.sh [key.path=value ...]
# Partition and account: export SBATCH_PARTITION and SBATCH_ACCOUNT, or write them into slurm/minichat/*.sbatch; modules
# and the virtual environment: slurm/environment.sh. Submit again only when no job of an earlier submission is left.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/refuse_folder.sh
refuse_folder "$@"
mkdir -p runs/minichat-3b/logs

after=()
for stage in conversations chat quality minichat benchmark; do
  if [ -e "runs/minichat-3b/$stage/manifest.json" ]; then
    echo "$stage: finished"
    continue
  fi
  job=$(sbatch --parsable "${after[@]}" "slurm/minichat/$stage.sbatch" "$@")
  job=${job%%;*}
  echo "$stage: job $job"
  after=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
done
