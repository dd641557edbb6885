#!/usr/bin/env bash
# Make an environment with the last transformers 4: the packages of .venv with three of them overlaid, so that torch is
# not downloaded again. Use it with PYTHONPATH=FOLDER .venv/bin/python. An existing folder is kept.
#
#   tools/make_transformers4_env.sh [FOLDER]        default: .venv/transformers4
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/.venv/transformers4}
python=${PYTHON:-$root/.venv/bin/python}
packages=(transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2) # the last 4.x, and the newest versions it accepts

if [[ "$(cat "$folder/made-of" 2>/dev/null)" == "${packages[*]}" ]]; then
    exit 0
fi
partial=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$partial"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$partial" "${packages[@]}"
echo "${packages[*]}" >"$partial/made-of"
rm -rf "$folder"
mv "$partial" "$folder"
