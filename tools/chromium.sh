#!/usr/bin/env bash
# Prints the path of `chromium`: the one on PATH, else Debian's package, installed (that takes root: it stands on a
# hundred libraries).
set -euo pipefail
if ! command -v chromium >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-cache show chromium >/dev/null 2>&1 || apt-get -qq update >&2
    apt-get -qq install --yes --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1
fi
command -v chromium
