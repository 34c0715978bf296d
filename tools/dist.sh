#!/usr/bin/env bash
# Puts what a release has into target/dist: dist.sh VERSION. `make dist` has built it before. The same
# sources make the same bytes. REGISTRY is where the manifests find the images.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$1
of_cargo=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
[ "$version" = "$of_cargo" ] || {
    echo "dist.sh: VERSION is $version, and Cargo.toml has $of_cargo; expected the same" >&2
    exit 1
}
dist=target/dist
rm -rf "$dist"
mkdir -p "$dist"
cp target/wasm32-wasip1/release/inflight_filter.wasm "$dist/inflight_filter-$version.wasm"
for arch in amd64 arm64; do
    cp "target/images/context/$arch/inflight-statserver" "$dist/inflight-statserver-$version-linux-$arch"
done
cp target/images/*.oci.tar "$dist"

python=$(tools/python.sh)
manifests=target/images/manifests
rm -rf "$manifests"
"$python" tools/manifests.py "$(tools/debian.sh kubectl kubernetes-client)" "$manifests"
for file in "$manifests"/*.yaml; do
    sed "s,registry.example.com,${REGISTRY:-registry.example.com}," "$file" >"$dist/$(basename "$file" .yaml)-$version.yaml"
done

# What is in the two programs. Without a time, and without a random serial number. The tool writes
# beside the Cargo.toml of every package.
sbom=0.5.9
trap 'find src benches tests -name "inflight-*.cdx.json" -delete' EXIT
if ! cargo cyclonedx --version 2>/dev/null | grep -q " $sbom$"; then
    [ -x .cache/cyclonedx/bin/cargo-cyclonedx ] ||
        CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=64 \
        cargo install --quiet --locked --root .cache/cyclonedx --version "$sbom" cargo-cyclonedx
    PATH="$PWD/.cache/cyclonedx/bin:$PATH"
fi
for part in filter:wasm32-wasip1 statserver:x86_64-unknown-linux-musl; do
    name=inflight-${part%%:*}
    SOURCE_DATE_EPOCH=0 cargo cyclonedx --quiet --format json --target "${part#*:}" --override-filename "$name.cdx" \
        --manifest-path "src/${part%%:*}/Cargo.toml"
    python3 - "src/${part%%:*}/$name.cdx.json" "$dist/$name-$version.cdx.json" <<'PYTHON'
import json, os, sys
source, target = sys.argv[1:]
with open(source) as file:
    sbom = json.load(file)
sbom.pop("serialNumber", None)
sbom.get("metadata", {}).pop("timestamp", None)
# Nor the folder that it was built in.
text = json.dumps(sbom, indent=2, sort_keys=True).replace(os.getcwd(), "/inflight")
with open(target, "w") as file:
    file.write(text + "\n")
PYTHON
done
(cd "$dist" && sha256sum -- * >SHA256SUMS)
ls "$dist"
