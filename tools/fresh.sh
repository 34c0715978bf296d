#!/usr/bin/env bash
# Runs a command as on a fresh machine: fresh.sh COMMAND... It runs in a copy of the sources in an
# empty folder, with an empty home, an empty cargo registry, and a Rust toolchain that has only the
# host's target and to which rustup adds nothing by itself. The configuration of cargo and pip and
# the installed Debian packages are the machine's. Nothing is left behind.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: fresh.sh COMMAND..." >&2 && exit 2; }
sysroot=$(rustc --print sysroot)
name=$(basename "$sysroot")
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
mkdir -p "$fresh"/{sources,home/.cargo,home/.config,"rustup/toolchains/$name"}

# Tracked or not, without built and downloaded files and the fuzzer's findings.
tar -c --exclude-vcs --exclude-from <(sed 's,^/,./,' .gitignore) . | tar -x -C "$fresh/sources"

for file in .cargo/config.toml .cargo/config .config/pip .pip; do
    [ ! -e "$HOME/$file" ] || cp -r "$HOME/$file" "$fresh/home/$file"
done
[ -z "${CARGO_HOME:-}" ] || cp "$CARGO_HOME"/config* "$fresh/home/.cargo/" 2>/dev/null || true

# A copy, so that the machine's own toolchain stays as it is. The books are half of it, and left
# out.
tar -C "$sysroot" -c --exclude=./share/doc/rust/html . | tar -x -C "$fresh/rustup/toolchains/$name"
cat > "$fresh/rustup/settings.toml" <<END
version = "12"
default_toolchain = "$name"
profile = "minimal"
END
export RUSTUP_HOME=$fresh/rustup RUSTUP_AUTO_INSTALL=0
cd "$fresh/sources"
host=$(rustc -vV | sed -n 's/^host: //p')
for target in $(rustup target list --installed | grep -vx "$host"); do
    rustup --quiet target remove "$target"
done
for component in rustfmt clippy; do
    ! rustup component list --installed | grep -q "^$component-" || rustup --quiet component remove "$component"
done
export HOME=$fresh/home
unset CARGO_HOME CARGO_TARGET_DIR
"$@"
