#!/usr/bin/env bash
# Prints the path of a Python in .cache with pip, and, unless it is called as `python.sh bare`, with the packages of requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/.cache/python
source tools/packages.sh
if [ ! -x "$folder/bin/pip" ]; then
    # Debian's Python makes environments, but puts no pip into them without one more package.
    python3 -c 'import ensurepip, venv' 2>/dev/null || packages "Python's ensurepip" python3-venv
    rm -rf "$folder"
    # Under a name of its own until it is whole.
    python3 -m venv "$folder.$$"
    mv "$folder.$$" "$folder"
fi
if [ "${1:-}" != bare ] && ! cmp -s tools/requirements.txt "$folder/requirements.txt"; then
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --requirement tools/requirements.txt >&2
    cp tools/requirements.txt "$folder/requirements.txt"
fi
echo "$folder/bin/python"
