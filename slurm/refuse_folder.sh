# shellcheck shell=bash
# The scripts in slurm/ contain the run's folder: for its logs, for its finished stages, and to see what a job has saved
# before it is requeued. With another folder, the stages would write where the scripts do not look.
#   refuse_folder ARGUMENTS...    exits with code 2 if an argument sets the run's name or folder
refuse_folder() {
  local argument
  for argument; do
    case $argument in
      output=* | name=*)
        echo "$argument: the scripts in slurm/ have a fixed run folder: change it there, or use \`minima submit\`" >&2
        exit 2
        ;;
    esac
  done
}
