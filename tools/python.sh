#!/usr/bin/env bash
# Prints the path of a Python with the packages of requirements.txt: a virtual environment in .cache.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/.cache/python
source tools/lock.sh
if ! cmp -s tools/requirements.txt "$folder/requirements.txt"; then
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check --requirement tools/requirements.txt >&2
    cp tools/requirements.txt "$folder/requirements.txt"
fi
echo "$folder/bin/python"
