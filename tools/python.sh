#!/usr/bin/env bash
# Prints the path of a Python in .cache with pip and the packages of requirements.txt. `python.sh
# bare` leaves the packages out.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/.cache/python
source tools/packages.sh
if [ ! -x "$folder/bin/pip" ]; then
    # Without python3-venv, the environments of Debian's Python have no pip.
    python3 -c 'import ensurepip, venv' 2>/dev/null || packages "Python's ensurepip" python3-venv
    rm -rf "$folder"
    # Under another name until it is complete.
    python3 -m venv "$folder.$$"
    mv "$folder.$$" "$folder"
fi
if [ "${1:-}" != bare ] && ! cmp -s tools/requirements.txt "$folder/requirements.txt"; then
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --requirement tools/requirements.txt >&2
    cp tools/requirements.txt "$folder/requirements.txt"
fi
echo "$folder/bin/python"
