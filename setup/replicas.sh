# Sourced by scripts that start replicas. Needs $rewarm and $work, whose folder `state` holds the replicas.

# Nothing is left running: the fetcher, too, goes soon after the last restore.
export REWARM_FETCHER_IDLE=${REWARM_FETCHER_IDLE:-15s}

# Stops every replica: they hold connections and mounts below the folder.
end_replicas() {
  local names
  names=$("$rewarm" --state "$work/state" ps --json 2>/dev/null |
    /usr/bin/python3 -c 'import json, sys; print(*(replica["name"] for replica in json.load(sys.stdin)["replicas"]))' 2>/dev/null) || true
  # shellcheck disable=SC2086
  [[ -z $names ]] || "$rewarm" --state "$work/state" stop $names --timeout 5s >/dev/null || true
}
