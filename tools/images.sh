#!/usr/bin/env bash
# Builds the images without a container engine, as OCI archives: images.sh FOLDER VERSION. Expects the
# context (images/statserver/Containerfile) in FOLDER/context. Says in one line where a kernel refuses
# buildah.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
version=$2
# Where the sources are published.
source=${SOURCE:-https://example.com/inflight}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
tools/debian.sh buildah buildah >/dev/null
storage=$(mktemp -d)
trap 'rm -rf "$storage"' EXIT
# Nothing of the machine's own storage and settings is used.
run() {
    buildah --root "$storage/root" --runroot "$storage/run" --storage-driver vfs "$@"
}

build() { # image, name, and what buildah is to be told of it
    run build --quiet --isolation chroot --timestamp 0 --build-arg "VERSION=$version" --build-arg "REVISION=$revision" \
        --build-arg "SOURCE=$source" --file "images/$1/Containerfile" "${@:2}" "$folder/context" >/dev/null
}

# The same bytes for the same files: no times, and entries in order.
archive() { # name
    local file=$folder/$1-$version.oci.tar
    tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --create --file "$file" --directory "$storage/$1" .
    echo "$file"
}

printf 'FROM scratch\n' >"$storage/Containerfile"
said=$(run build --quiet --isolation chroot --file "$storage/Containerfile" "$storage" 2>&1) || {
    echo "no images: buildah does not run on this kernel: $(tail -n1 <<<"$said")" >&2
    exit 3
}
# One after the other: their order in the image's index is then always the same.
for arch in amd64 arm64; do
    build statserver --platform "linux/$arch" --manifest inflight-statserver
done
run manifest push --quiet --all inflight-statserver "oci:$storage/inflight-statserver:$version" >/dev/null
archive inflight-statserver
# One manifest, and no index of architectures: some who pull it know none.
build filter --tag inflight-filter
run push --quiet inflight-filter "oci:$storage/inflight-filter:$version" >/dev/null
archive inflight-filter
