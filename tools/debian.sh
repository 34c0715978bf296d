#!/usr/bin/env bash
# Prints the path of a program: debian.sh PROGRAM PACKAGE... It is the one on PATH, else that of
# Debian's packages, which are installed. That takes root, because some need a hundred libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$1
shift
if ! command -v "$program" >/dev/null; then
    source tools/packages.sh
    command -v "$program" >/dev/null || packages "$program" "$@"
fi
command -v "$program"
