#!/bin/sh
# Runs nginx.conf in the foreground: nginx.sh --port PORT [--prefix DIR] [--host ADDRESS] [--user USER]
#
# Workers run as root unless told otherwise: to dump processes of another user, CRIU needs CAP_SYS_RESOURCE, which root
# does not have on every machine.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
host=127.0.0.1
port=8000
prefix=/tmp/nginx
user=root
while [ $# -gt 0 ]; do
  case $1 in
    --port) port=$2 ;;
    --prefix) prefix=$2 ;;
    --host) host=$2 ;;
    --user) user=$2 ;;
    *) echo "nginx.sh: no option $1" >&2; exit 2 ;;
  esac
  shift 2
done

mkdir -p "$prefix/content/uploads" "$prefix/temporary"
chown "$user" "$prefix/content/uploads"
cp "$here/nginx.conf" "$prefix/nginx.conf"
echo "listen $host:$port;" >"$prefix/listen.conf"
echo "user $user;" >"$prefix/user.conf"
# A file of 0.9 MB, which takes several writes to send.
seq -w 1 131072 >"$prefix/content/numbers"
# A socket that an earlier run left would keep this one from listening.
rm -f "$prefix/inner.sock"
# nginx takes the paths of sockets as they are, from its working folder.
cd "$prefix"
echo "listening on $host:$port"
exec nginx -p "$prefix" -c "$prefix/nginx.conf" -e stderr
