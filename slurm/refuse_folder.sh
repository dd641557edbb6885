# shellcheck shell=bash
# The plain files name their run's folder themselves: for its logs, for what is finished, and for what was saved before a
# job is requeued. Told another one, their stages would write where none of these look.
#   refuse_folder ARGUMENTS...    ends with exit code 2 where one of them names the run or its folder
refuse_folder() {
  local argument
  for argument; do
    case $argument in
      output=* | name=*)
        echo "$argument: these files name the run's folder themselves: change it there, or use \`minima submit\`" >&2
        exit 2
        ;;
    esac
  done
}
