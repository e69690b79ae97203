# Sourced by scripts that need a bucket for as long as they run: a Garage server of one node on this machine, with one bucket and
# one key. They set $work, a folder that they remove. Gives:
#   start_garage   starts it; $store names the bucket, the usual AWS variables are set
#   end_garage     ends it, if it runs
garage=

free_port() {
  /usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

http_status() {
  /usr/bin/python3 - "$1" <<'PY'
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print("none")
PY
}

# One node, one bucket, one key, all of them made at start.
start_garage() {
  local api rpc secret
  api=$(free_port) rpc=$(free_port) secret=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
  cat >"$work/garage.toml" <<TOML
metadata_dir = "$work/garage/meta"
data_dir = "$work/garage/data"
db_engine = "sqlite"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:$rpc"
rpc_public_addr = "127.0.0.1:$rpc"
rpc_secret = "$secret"

[s3_api]
s3_region = "garage"
api_bind_addr = "127.0.0.1:$api"
TOML
  export AWS_ACCESS_KEY_ID=GK${secret:0:24} AWS_SECRET_ACCESS_KEY=$secret
  export AWS_ENDPOINT_URL=http://127.0.0.1:$api AWS_REGION=garage AWS_ALLOW_HTTP=true
  GARAGE_DEFAULT_ACCESS_KEY=$AWS_ACCESS_KEY_ID GARAGE_DEFAULT_SECRET_KEY=$secret GARAGE_DEFAULT_BUCKET=demo \
    "$cache/garage/bin/garage" -c "$work/garage.toml" server --single-node --default-bucket >"$work/garage.log" 2>&1 </dev/null &
  garage=$!
  # The bucket is made after the port opens. 403, no signature, says that it is there.
  for _ in $(seq 300); do
    if [[ $(http_status "http://127.0.0.1:$api/demo/") == 403 ]]; then
      store=s3://demo
      return
    fi
    kill -0 "$garage" 2>/dev/null || break
    sleep 0.05
  done
  tail -n 5 "$work/garage.log" >&2
  fail "Garage does not start"
}

end_garage() {
  [[ -z $garage ]] || { kill "$garage" && wait "$garage"; } 2>/dev/null || true
  garage=
}
