# Sourced: what follows is done by one at a time. Tests run beside each other, and on a fresh machine each finds nothing there.
mkdir -p "$(dirname "${BASH_SOURCE[0]}")/../.cache"
exec 9>"$(dirname "${BASH_SOURCE[0]}")/../.cache/lock"
flock 9
