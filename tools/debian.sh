#!/usr/bin/env bash
# Prints the path of a program: debian.sh PROGRAM PACKAGE... It is the one on PATH, else out of Debian's packages,
# which are installed (that takes root: some stand on a hundred libraries).
set -euo pipefail
program=$1
shift
if ! command -v "$program" >/dev/null; then
    source "$(dirname "$0")/lock.sh"
    export DEBIAN_FRONTEND=noninteractive
    apt-cache show "$@" >/dev/null 2>&1 || apt-get -qq update >&2
    apt-get -qq install --yes --no-install-recommends "$@" >/dev/null 2>&1 9>&- || {
        echo "$program is not there, and the packages $* cannot be installed" >&2
        exit 1
    }
fi
command -v "$program"
