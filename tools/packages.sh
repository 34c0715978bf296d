# Sourced: `packages WHAT PACKAGE...` installs Debian's packages for WHAT, one process at a time, or
# says in one line what to install.
# shellcheck source=tools/lock.sh
source "$(dirname "${BASH_SOURCE[0]}")/lock.sh"

packages() {
    local what=$1 said
    shift
    local ask="install it, on Debian with \`apt-get install --no-install-recommends $*\`"
    command -v apt-get >/dev/null || { echo "$what is not there: $ask" >&2 && return 1; }
    [ "$(id -u)" = 0 ] || { echo "$what is not there, and only root can install it: $ask" >&2 && return 1; }
    # A fresh machine has no package lists, and old lists name packages that no longer exist.
    said=$(install_packages "$@" 2>&1) || said=$(apt-get -qq update 2>&1 9>&- && install_packages "$@" 2>&1) || {
        echo "$what is not there, and apt-get cannot install it ($(grep -m1 '^E:' <<<"$said" || tail -n1 <<<"$said")): $ask" >&2
        return 1
    }
}

# Processes that apt-get starts must not hold the lock.
install_packages() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends -o DPkg::Lock::Timeout=300 "$@" 9>&-
}
