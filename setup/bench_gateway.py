"""Measures the gateway beside nginx and HAProxy, in turns, and prints a table.

The server behind each is the same nginx with a fixed answer in a restored replica: for the gateway in a network of its own, for
the others in that of the host, since they have to reach it. Two loads, 64 connections each: as fast as it goes, and half of what nginx takes as a proxy, the same for all.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

from ended import end_by_signal

CONNECTIONS = 64
BODY = "x" * 512
BACKEND, DIRECT, NGINX, HAPROXY, REWARM, ADMIN = 8000, 18000, 18001, 18002, 18003, 18004
NAMES = {"direct": DIRECT, "nginx": NGINX, "HAProxy": HAPROXY, "rewarm": REWARM}

SERVER = """
daemon off; master_process off; pid {work}/{name}.pid; error_log {log} error;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 1000000000;
  client_body_temp_path {work}/t; proxy_temp_path {work}/t; fastcgi_temp_path {work}/t; uwsgi_temp_path {work}/t; scgi_temp_path {work}/t;
  server {{ listen {port}; location / {{ default_type text/plain; return 200 "{body}"; }} }}
}}
"""
PROXY = """
daemon off; pid {work}/proxy.pid; error_log {work}/proxy.log error; worker_processes auto;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000;
  client_body_temp_path {work}/t; proxy_temp_path {work}/t; fastcgi_temp_path {work}/t; uwsgi_temp_path {work}/t; scgi_temp_path {work}/t;
  upstream server {{ server 127.0.0.1:{direct}; keepalive 256; keepalive_requests 1000000000; }}
  server {{ listen {port}; location / {{ proxy_pass http://server; proxy_http_version 1.1; proxy_set_header Connection ""; }} }}
}}
"""
BALANCER = """
global
  maxconn 4096
  nbthread {threads}
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
frontend clients
  bind 127.0.0.1:{port}
  default_backend server
backend server
  server one 127.0.0.1:{direct}
"""
POOL = """
[[pool]]
name = "bench"
snapshot = "file://{work}/store/bench@v1"
listen = "127.0.0.1:{port}"
port = {backend}
concurrency = {connections}
min_replicas = 1
max_replicas = 1
follow = "0s"

[serve]
admin = "127.0.0.1:{admin}"
"""
# One request of a connection each `interval` milliseconds; the first one at any point of it.
PACED = """
local interval = {interval}
local first = true
function delay()
  if first then first = false; return math.random() * interval end
  return interval
end
"""


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(str(word) for word in command)}: status {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def until_answered(port):
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                assert answer.read().decode() == BODY
                return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def milliseconds(text):
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 0.001, "ms": 1, "s": 1000, "m": 60000}[unit]


def load(port, seconds, script=None):
    """Requests a second, and the 99th percentile of their times in milliseconds."""
    extra = ["-s", script] if script else []
    text = run("wrk", "-t", 2, "-c", CONNECTIONS, "-d", f"{seconds}s", "--latency", *extra, f"http://127.0.0.1:{port}/")
    wrong = re.search(r"Socket errors.*|Non-2xx.*", text)
    if wrong:
        sys.exit(f"port {port}: {wrong.group()}")
    return float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1)), milliseconds(re.search(r"^ *99% +(\S+)", text, re.MULTILINE).group(1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewarm", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6)
    options = parser.parse_args()
    end_by_signal()
    work, state = options.work, options.work / "state"
    rewarm = [options.rewarm, "--state", state]

    for name, port in (("bench", BACKEND), ("direct", DIRECT)):
        text = SERVER.format(work="/tmp", name="server", log="/dev/stderr", port=port, body=BODY)
        (work / f"{name}.conf").write_text(text)
    (work / "proxy.conf").write_text(PROXY.format(work=work, direct=DIRECT, port=f"127.0.0.1:{NGINX}"))
    (work / "balancer.conf").write_text(BALANCER.format(direct=DIRECT, port=HAPROXY, threads=os.cpu_count()))
    (work / "pool.toml").write_text(POOL.format(work=work, port=REWARM, backend=BACKEND, connections=CONNECTIONS, admin=ADMIN))

    nginx = shutil.which("nginx")
    for name, port, net in (("bench", BACKEND, []), ("direct", DIRECT, ["--net", "host"])):
        run(*rewarm, "run", name, *net, "--port", port, "--ready", f"http://localhost:{port}/", "--mount", f"{work}/{name}.conf:/srv/nginx.conf",
            "--", nginx, "-c", "/srv/nginx.conf")
        run(*rewarm, "snapshot", name, f"file://{work}/store/{name}@v1", "--stop")
    run(*rewarm, "restore", f"file://{work}/store/direct@v1", "--name", "direct-again")
    programs = [
        [nginx, "-c", work / "proxy.conf"],
        ["haproxy", "-f", work / "balancer.conf"],
        [*rewarm, "serve", "-f", work / "pool.toml"],
    ]
    running = [subprocess.Popen([str(word) for word in program], stdout=open(work / "log", "ab"), stderr=subprocess.STDOUT) for program in programs]
    try:
        for port in NAMES.values():
            until_answered(port)
        fast = {name: [] for name in NAMES}
        paced = {name: [] for name in NAMES}
        half = None
        for _ in range(options.rounds):
            for name, port in NAMES.items():
                fast[name].append(load(port, options.seconds))
            half = half or fast["nginx"][0][0] / 2
            (work / "paced.lua").write_text(PACED.format(interval=1000 * CONNECTIONS / half))
            for name, port in NAMES.items():
                paced[name].append(load(port, options.seconds, work / "paced.lua"))
        with urllib.request.urlopen(f"http://127.0.0.1:{ADMIN}/admin/status?decisions=0&starts=0") as answer:
            totals = json.load(answer)["pools"][0]["totals"]
    finally:
        # A program that has ended by itself has said why in the log.
        for program in reversed(running):
            program.terminate()
        for program in running:
            program.wait(timeout=60)
    assert totals["cut_off"] == 0 and totals["refused_full"] == 0, totals

    spread = lambda rounds, which, digits: "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(  # noqa: E731
        *(pick([one[which] for one in rounds]) for pick in (statistics.median, min, max)), d=digits
    )
    middle = lambda rounds, which: statistics.median(one[which] for one in rounds)  # noqa: E731
    base_fast, base_paced = (middle(kind["direct"], 1) for kind in (fast, paced))
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {platform.release()}, {CONNECTIONS} connections, {options.rounds} rounds of {options.seconds} s, medians (least to most)")
    print(f"half load: {half:.0f} requests a second, the same for all\n")
    print("| | requests/s | of nginx | p99, as fast as it goes | p99 at half load | p99 added to direct | of what nginx adds |")
    print("|---|---|---|---|---|---|---|")
    nginx_rate, nginx_added = middle(fast["nginx"], 0), middle(paced["nginx"], 1) - base_paced
    for name in NAMES:
        rate, added = middle(fast[name], 0), middle(paced[name], 1) - base_paced
        proxied = name != "direct"
        print(f"| {name} | {spread(fast[name], 0, 0)} | {rate / nginx_rate:.2f} | {spread(fast[name], 1, 1)} ms | {spread(paced[name], 1, 1)} ms | "
              + (f"{added:.2f} ms | {added / nginx_added:.2f} |" if proxied and nginx_added > 0 else "| |"))


if __name__ == "__main__":
    main()
