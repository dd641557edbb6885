#!/usr/bin/env bash
# Submits MiniMA-3B: a job for each unfinished stage, which starts after the one before it has succeeded.
#   slurm/minima.sh [key.path=value ...]
# Partition and account: export SBATCH_PARTITION and SBATCH_ACCOUNT, or write them into slurm/minima/*.sbatch; modules
# and the virtual environment: slurm/environment.sh. Submit again only when no job of an earlier submission is left.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/refuse_folder.sh
refuse_folder "$@"
mkdir -p runs/minima-3b/logs

after=()
for stage in expanded corpus teacher pruned student quality minima; do
  if [ -e "runs/minima-3b/$stage/manifest.json" ]; then
    echo "$stage: finished"
    continue
  fi
  job=$(sbatch --parsable "${after[@]}" "slurm/minima/$stage.sbatch" "$@")
  job=${job%%;*}
  echo "$stage: job $job"
  after=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
done
