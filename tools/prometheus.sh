#!/usr/bin/env bash
# Prints the path of `prometheus` or `promtool`: the one on PATH, else that of Debian's package,
# unpacked into .cache.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
if found=$(command -v "$name"); then
    echo "$found"
    exit
fi
folder=$PWD/.cache/prometheus
source tools/lock.sh
if [ ! -x "$folder/usr/bin/$name" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    download() { (cd "$work" && apt-get -qq download prometheus 2>&1 9>&-); }
    # A fresh machine may have no package lists. Updating them takes root; downloading does not.
    said=$(download) || said=$(apt-get -qq update 2>&1 9>&- && download) || {
        echo "$name is not there, and Debian's package cannot be had" \
            "($(grep -m1 '^E:' <<<"$said" || tail -n1 <<<"$said")): put \`$name\` on the PATH, or run \`apt-get update\` as root" >&2
        exit 1
    }
    mkdir -p "$folder.$$"
    dpkg-deb -x "$work"/prometheus_*.deb "$folder.$$"
    rm -rf "$folder"
    mv "$folder.$$" "$folder"
fi
echo "$folder/usr/bin/$name"
