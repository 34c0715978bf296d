# Sourced: only one process at a time runs what follows. Tests run in parallel, and on a fresh
# machine each finds everything missing.
mkdir -p "$(dirname "${BASH_SOURCE[0]}")/../.cache"
exec 9>"$(dirname "${BASH_SOURCE[0]}")/../.cache/lock"
flock 9
