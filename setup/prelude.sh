# Sourced by every script of this folder. Gives:
#   $cache      where everything that is installed or built lies, so that later runs reuse it
#   $here       this folder
#   say TEXT    one line for a person
#   fail TEXT   one line that names the missing piece, then the end
#   logged NAME COMMAND...   runs COMMAND with its output in $cache/log/NAME; shows the end of it on failure
#   alone NAME  waits until no other set-up of the same piece runs on this machine
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${REWARM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/rewarm}
piece=setup/$(basename "$0")
export LC_ALL=C.UTF-8

mkdir -p "$cache/log"

say() {
  printf '%s: %s\n' "$piece" "$*"
}

fail() {
  printf '%s: %s\n' "$piece" "$*" >&2
  exit 1
}

logged() {
  local log=$cache/log/$1
  shift
  if ! "$@" >>"$log" 2>&1 </dev/null; then
    printf '%s: the last lines of %s:\n' "$piece" "$log" >&2
    tail -n 6 "$log" | cut -c 1-160 | sed 's/^/  | /' >&2
    return 1
  fi
}

alone() {
  exec 9>"$cache/log/$1.lock"
  flock 9
  : >"$cache/log/$1"
}
