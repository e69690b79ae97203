"""Measures pools of `rewarm serve` on real replicas, and the simulator beside a replay of the same trace; prints tables.

Two servers: the embedding server of examples/, and a small one of the standard library. Both are restored from a folder.
Every step from rest comes after a pause, as in bench.py.
"""

import argparse
import contextlib
import csv
import datetime
import http.client
import json
import math
import os
import pathlib
import platform
import queue
import random
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

from bench import PAUSE
from demo import Failed, Rewarm
from ended import end_by_signal
from settle import add_flag, settle, told

INSIDE, PORT, ADMIN, KEDA = 8000, 18010, 18011, 18012
PATIENCE = 180
RUNNING_ASKED = 30
BURST, CAP = 64, 8
HELD = 10_000
# Requests of which the KEDA scaler is to tell, one after the other.
TOLD = 50
# Of the listener and of the client whose request it is told of.
LISTENER_NICE = -10
# What the policy may use in the replay. Little, so that requests do wait.
TRACE_CONCURRENCY, TRACE_MAX = 4, 4
# Simulations of the replayed trace.
SEEDS = 15
POLL = 0.05
# Seconds between two looks at the starts of the replay: far fewer than the pool remembers happen meanwhile.
LEARN = 10

SMALL = '''
import http.server, time, urllib.parse

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        asked = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        time.sleep(float(asked.get("s", ["0"])[0]))
        self.send_response(200)
        self.send_header("content-length", "3")
        self.end_headers()
        self.wfile.write(b"ok\\n")
        self.wfile.flush()

http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
'''
# Opens many connections in a process of its own, asks over each, and says when all have been sent. Ends when stdin does.
HOLDER = '''
import asyncio, resource, sys

async def main(port, count):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    writers = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /?s=0 HTTP/1.1\\r\\nhost: held.example\\r\\n\\r\\n")
        writers.append((reader, writer))
    print("sent", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
'''


class Server:
    """What is served, and a request of a user."""

    def __init__(self, name, label, command, mounts, path, body=None):
        self.name, self.label, self.command, self.mounts, self.path = name, label, command, mounts, path
        self.body = None if body is None else json.dumps(body)

    def ask(self, path=None):
        """Asks through the gateway; seconds, and how many milliseconds the request was held."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=PATIENCE)
        connection.request("GET" if self.body is None else "POST", path or self.path, self.body, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.status != 200:
            raise Failed(f"{self.name} answers {answer.status}: {text[:300]!r}")
        return time.monotonic() - began, float(answer.headers.get("x-rewarm-held-ms", 0))


def status(starts=0):
    with urllib.request.urlopen(f"http://127.0.0.1:{ADMIN}/admin/status?decisions=0&starts={starts}", timeout=30) as answer:
        return json.load(answer)["pools"][0]


def until(what, true):
    """Waits until the pool's status is as wanted, and gives it back."""
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            pool = status()
            if true(pool):
                return pool
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {PATIENCE} s")
        time.sleep(POLL)


def states(pool):
    return sorted(replica["state"] for replica in pool["replicas"])


def percentile(values, share):
    """The smallest value that so large a share of all does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def spread(values, scale=1000.0, unit="ms"):
    return f"{statistics.median(values) * scale:.0f} {unit} ({min(values) * scale:.0f} to {max(values) * scale:.0f})"


def children(pid):
    return [int(child) for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def resident(pid):
    """Bytes of memory, shared ones too."""
    fields = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Rss"].split()[0]) << 10


class Told:
    """The scaler's stream `StreamIsActive`, as KEDA has it open. Frames of HTTP/2 are read and written here: a library would be one
    more process or package for two messages of a few bytes."""

    DATA, HEADERS, SETTINGS, PING, ACK, END_STREAM, END_HEADERS = 0, 1, 4, 6, 1, 1, 4

    def __init__(self):
        self.socket = socket.create_connection(("127.0.0.1", KEDA))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.messages = queue.Queue()
        head = {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/externalscaler.ExternalScaler/StreamIsActive",
            ":authority": f"127.0.0.1:{KEDA}",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        # In no table and not compressed.
        fields = b"".join(b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in field) for field in head.items())
        # ScaledObjectRef { name: "bench", scalerMetadata: { "pool": "bench" } }, behind a flag and its length.
        asked = b"\x0a\x05bench" + b"\x1a\x0d" + b"\x0a\x04pool" + b"\x12\x05bench"
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(self.SETTINGS, 0, 0, b"")
        self.send(self.HEADERS, self.END_HEADERS, 1, fields)
        self.send(self.DATA, self.END_STREAM, 1, b"\0" + len(asked).to_bytes(4, "big") + asked)
        threading.Thread(target=self.read, daemon=True).start()

    def send(self, kind, flags, stream, payload):
        self.socket.sendall(len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload)

    def read(self):
        """Until the stream ends. There are too few messages to fill a window."""
        frames = self.socket.makefile("rb")
        while len(head := frames.read(9)) == 9:
            kind, flags, payload = head[3], head[4], frames.read(int.from_bytes(head[:3], "big"))
            if kind == self.DATA:
                # IsActiveResponse { result }, behind a flag and its length; empty where it is false.
                self.messages.put((time.monotonic(), payload[5:] == b"\x08\x01"))
            elif kind in (self.SETTINGS, self.PING) and not flags & self.ACK:
                self.send(kind, self.ACK, 0, payload if kind == self.PING else b"")

    def next(self, wanted):
        """When the next message of this kind came, from now on."""
        while True:
            try:
                at, active = self.messages.get(timeout=PATIENCE)
            except queue.Empty:
                raise Failed(f"the KEDA scaler did not tell {wanted} within {PATIENCE} s") from None
            if active == wanted:
                return at

    def end(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Bench:
    def __init__(self, options):
        self.options, self.work = options, options.work
        self.rewarm = Rewarm(options.rewarm, options.work / "state")
        small = options.work / "small.py"
        small.write_text(SMALL)
        program = options.examples / "embedding" / "server.py"
        self.small = Server("small", "small server", ["/usr/bin/python3", "-B", "/srv/small.py"], [f"{small}:/srv/small.py:ro"], "/")
        self.embedding = Server("embedding", "embedding server", [options.python, program], [], "/embed", {"texts": ["hello"]})

    def note(self, text):
        print(f"bench-serve: {text}", file=sys.stderr, flush=True)

    def store(self, server):
        """The server's snapshot, taken at its first use."""
        folder = self.work / "stores" / server.name
        if not folder.exists():
            self.note(f"snapshot of the {server.label}")
            ready = f"http://127.0.0.1:{INSIDE}/{'healthz' if server is self.embedding else ''}"
            mounts = [word for mount in server.mounts for word in ("--mount", mount)]
            self.rewarm("run", server.name, "--port", INSIDE, "--ready", ready, *mounts, "--", *server.command)
            self.rewarm("snapshot", server.name, f"file://{folder}/{server.name}@v1", "--stop")
            self.rewarm("rm", server.name)
        return folder

    @contextlib.contextmanager
    def serving(self, server, more, serve=""):
        """`rewarm serve` with one pool; its process."""
        file = self.work / "pool.toml"
        file.write_text(
            f"[[pool]]\nname = 'bench'\nsnapshot = 'file://{self.store(server)}/{server.name}@v1'\n"
            f"listen = '127.0.0.1:{PORT}'\nport = {INSIDE}\n{more}\n[serve]\nadmin = '127.0.0.1:{ADMIN}'\n{serve}"
        )
        command = [self.options.rewarm, "--state", self.work / "state", "serve", "-f", file]
        with open(self.work / "log", "ab") as log:
            process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
        try:
            until("the snapshot is known", lambda pool: pool["digest"])
            yield process
        except Failed as failed:
            raise Failed(f"{failed}\n{(self.work / 'log').read_text()[-1500:]}") from None
        finally:
            process.terminate()
            process.wait(timeout=60)

    def running(self, server):
        """What an answer takes where a replica is there, through the gateway."""
        with self.serving(server, "min_replicas = 1\nfollow = '0s'"):
            until("a replica serves", lambda pool: states(pool) == ["ready"])
            for _ in range(5):
                server.ask()
            return [server.ask()[0] for _ in range(RUNNING_ASKED)]

    def cache(self, *words):
        command = [self.options.rewarm, "--state", self.work / "state", "--json", "cache", *words]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    def prefetched(self):
        """Waits until the pool has its snapshot on the machine."""
        deadline = time.monotonic() + 60
        while not any(stream["complete"] for stream in self.cache().get("streams", [])):
            if time.monotonic() > deadline:
                raise Failed("the snapshot was not brought onto the machine")
            time.sleep(0.1)

    def from_rest(self, server, warm, decoded=True):
        """What the first answers take where no replica serves, and `warm` are paused; without `decoded` the fetcher holds nothing of it."""
        hasty = "policy = { kind = 'rewarm', keep_last = 0.1, keep = 0.1 }\nfollow = '0s'"
        at_rest = ["warm"] * warm
        took = []
        self.cache("--clear")
        # A pool that wants it decoded would bring it again.
        prefetch = f"prefetch = {str(decoded).lower()}"
        with self.serving(server, f"warm = {warm}\nmax_replicas = 1\n{prefetch}\n{hasty}"):
            if decoded:
                self.prefetched()
            for round in range(self.options.rounds):
                until("the pool is at rest", lambda pool: states(pool) == at_rest)
                if not decoded:
                    self.cache("--clear")
                settle(PAUSE, self.options.own_mib)
                seconds, held = server.ask()
                if not held:
                    raise Failed("a replica was there: the request was not held")
                took.append(seconds)
                self.note(f"answered after {seconds * 1000:.0f} ms")
        return took[: self.options.rounds]

    def rest(self, which):
        warm = 1 if which == "wake" else 0
        goal = {"wake": "30 ms", "zero": "400 ms", "store": "400 ms"}[which]
        what = {"wake": "to a paused one", "zero": "to one in a folder, decoded here by the pool", "store": "to one in a folder, of which nothing is decoded here"}[which]
        for server in (self.embedding, self.small):
            self.note(f"{server.label}, {which}")
            running, first = self.running(server), self.from_rest(server, warm, which != "store")
            above = (statistics.median(first) - statistics.median(running)) * 1000
            aim = goal if server is self.embedding else ""
            self.row(f"{server.label}: first request {what}", f"{spread(first)}; running {spread(running)}", f"{above:.0f} ms above", aim)

    def burst(self):
        server, last, refused = self.embedding, {}, 0
        folder = self.store(server)
        limits = f"concurrency = {CAP}\nqueue = {{ max = 1000, deadline = '170s' }}\nstart_timeout = '170s'\nfollow = '0s'"
        for name in ["restored"] * self.options.rounds + ["cold"]:
            self.note(f"burst of {BURST}, {name}")
            with self.serving(server, limits):
                if name == "cold":
                    folder.rename(folder.with_name("away"))
                try:
                    settle(PAUSE, self.options.own_mib)
                    answers, failures = [], []

                    def one():
                        try:
                            answers.append(server.ask()[0])
                        except (Failed, OSError) as error:
                            failures.append(error)

                    clients = [threading.Thread(target=one) for _ in range(BURST)]
                    began = time.monotonic()
                    for client in clients:
                        client.start()
                    for client in clients:
                        client.join()
                    took = time.monotonic() - began
                    tiers = sorted({start["tier"] for start in status(starts=200)["starts"] if start["outcome"] == "ready"})
                finally:
                    if name == "cold":
                        folder.with_name("away").rename(folder)
            if failures:
                refused += len(failures)
                self.note(f"not answered: {failures[0]}")
            self.note(f"last answer after {took:.1f} s, by replicas that were started by {', '.join(tiers)}")
            last.setdefault(name, []).append(took)
        times = statistics.median(last["cold"]) / statistics.median(last["restored"])
        self.row(f"embedding server: last of {BURST} requests to a pool at zero", f"{spread(last['restored'], 1, 's')}; cold {spread(last['cold'], 1, 's')}",
                 f"{times:.1f} times sooner, {refused} not answered", "3 times, 0")

    def held(self):
        self.note(f"{HELD} held requests")
        limits = f"concurrency = 1\nmin_replicas = 1\nmax_replicas = 1\nqueue = {{ max = {HELD}, deadline = '170s' }}\nfollow = '0s'"
        with self.serving(self.small, limits) as process:
            until("a replica serves", lambda pool: states(pool) == ["ready"])
            gateway = children(process.pid)[0]
            before = resident(gateway), resident(process.pid)
            busy = threading.Thread(target=lambda: self.small.ask("/?s=40"))
            busy.start()
            until("the only slot is taken", lambda pool: pool["in_flight"] == 1)
            holder = subprocess.Popen(["/usr/bin/python3", "-c", HOLDER, str(PORT), str(HELD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            try:
                holder.stdout.readline()
                until("all are held", lambda pool: pool["held"] == HELD)
                after = resident(gateway), resident(process.pid)
            finally:
                holder.kill()
                holder.wait()
            left = until("they are forgotten", lambda pool: pool["held"] == 0)
            busy.join()
        mib = [value >> 20 for value in (*before, *after)]
        self.row(f"memory with {HELD} held requests: gateway and its parent", f"{mib[2]} and {mib[3]} MiB; with none {mib[0]} and {mib[1]} MiB",
                 f"{mib[2] + mib[3]} MiB, {left['totals']['refused_full']} refused", "300 MiB")

    def keda(self):
        self.note(f"what KEDA is told of {TOLD} requests to a pool at zero")
        # The listener is a machine of its own with those who have one: here, what restores and wakes does not keep it waiting.
        hasty = "max_replicas = 1\npolicy = { kind = 'rewarm', keep_last = 0.1, keep = 0.1 }\nfollow = '0s'"
        dice, took = random.Random(7), []
        with self.serving(self.small, hasty, f"keda = '127.0.0.1:{KEDA}'\n"):
            os.setpriority(os.PRIO_PROCESS, 0, LISTENER_NICE)
            told = Told()
            try:
                told.next(False)
                for _ in range(TOLD):
                    # The scaler looks each second, too: at no particular time after that.
                    time.sleep(0.1 + dice.random())
                    began, answer = time.monotonic(), []
                    client = threading.Thread(target=lambda answer=answer: answer.append(self.small.ask()))
                    client.start()
                    took.append(told.next(True) - began)
                    client.join()
                    if not answer or not answer[0][1]:
                        raise Failed("a replica was there, or there was no answer: the request was not held")
                    told.next(False)
                    until("the pool is at rest", lambda pool: states(pool) == [])
            finally:
                told.end()
                os.setpriority(os.PRIO_PROCESS, 0, 0)
        figures = " / ".join(f"{value * 1000:.1f}" for value in (statistics.median(took), percentile(took, 0.95), max(took)))
        self.row(f"KEDA's stream is told of a request to a pool at zero, {TOLD} times: p50 / p95 / most", f"{figures} ms", f"{max(took) * 1000:.1f} ms at most", "50 ms")

    def trace(self):
        """Arrivals and service times in seconds."""
        seconds = self.options.trace_seconds
        if self.options.trace is None:
            # Calm, and now and then six times as much: the same each time.
            dice, at, trace = random.Random(6), 0.0, []
            while True:
                busy = (at % 25) > 19
                at += dice.expovariate(18 if busy else 3)
                if at > seconds:
                    return trace
                trace.append((at, min(dice.lognormvariate(-0.7, 0.5), 3)))
        rows = list(csv.DictReader(self.options.trace.read_text().splitlines()))
        if "arrival_s" in rows[0]:
            trace = [(float(row["arrival_s"]), float(row["service_s"])) for row in rows]
        else:
            stamp = lambda row: datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()  # noqa: E731
            trace = [(stamp(row), 0.05 + int(row["ContextTokens"]) / 8000 + int(row["GeneratedTokens"]) * 0.02) for row in rows]
        first = trace[0][0]
        return [(at - first, service) for at, service in trace if at - first <= seconds]

    def replay(self):
        trace = self.trace()
        self.note(f"replay of {len(trace)} requests in {trace[-1][0]:.0f} s")
        limits = f"concurrency = {TRACE_CONCURRENCY}\nmax_replicas = {TRACE_MAX}\nfollow = '0s'"
        waits, failures, sums = [], [], [0.0]
        with self.serving(self.small, limits):
            # The fetcher runs from here on, as it does in a pool that has served before.
            self.small.ask()
            until("the pool is at rest", lambda pool: states(pool) == [])
            # The pool remembers the last ones only, so they are asked for again and again.
            starts, over = {}, threading.Event()
            learn = lambda: starts.update({(start["at"], start["replica"]): start for start in status(starts=200)["starts"]})  # noqa: E731
            learn()
            earlier = set(starts)

            def watch():
                """Adds up how long replicas were on their way, served or finished what they had."""
                before = learned = time.monotonic()
                while not over.is_set() or status()["replicas"]:
                    time.sleep(POLL / 2)
                    count, now = len(status()["replicas"]), time.monotonic()
                    sums[0] += count * (now - before)
                    before = now
                    if now - learned > LEARN:
                        learn()
                        learned = now

            def one(service):
                try:
                    waits.append(self.small.ask(f"/?s={service:.4f}")[1])
                except (Failed, OSError) as error:
                    failures.append(error)

            watcher = threading.Thread(target=watch)
            watcher.start()
            began, clients = time.monotonic(), []
            for at, service in trace:
                time.sleep(max(began + at - time.monotonic(), 0))
                clients.append(threading.Thread(target=one, args=(service,)))
                clients[-1].start()
            for client in clients:
                client.join()
            over.set()
            watcher.join()
            learn()
            starts = [starts[key] for key in sorted(starts) if key not in earlier and starts[key]["outcome"] == "ready"]
        if failures:
            raise Failed(f"{len(failures)} requests of the replay failed, such as: {failures[0]}")
        (self.work / "starts").write_text("".join(f"{start['took_ms'] / 1000:.4f}\n" for start in starts))
        (self.work / "trace.csv").write_text("arrival_s,service_s\n" + "".join(f"{at:.4f},{service:.4f}\n" for at, service in trace))
        # Which start takes which of the measured times is drawn, and what follows from it differs as much as two replays do.
        drawn = []
        for seed in range(1, SEEDS + 1):
            settings = self.work / "simulate.toml"
            settings.write_text(f"seed = {seed}\n")
            simulated, _ = self.rewarm("simulate", self.work / "trace.csv", "--policy", "rewarm", "--restore", self.work / "starts", "--warm", 0,
                                       "--concurrency", TRACE_CONCURRENCY, "--max", TRACE_MAX, "--config", settings)
            drawn.append(simulated["policies"][0])
        what = f"replay of {len(trace)} requests in {trace[-1][0]:.0f} s, and {SEEDS} simulations of it"
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
            live, model = percentile(waits, share), [outcome["wait_ms"][name] for outcome in drawn]
            apart = abs(live - statistics.median(model))
            self.row(f"{what}: {name} of waits", f"live {live:.0f} ms; simulated {spread(model, 1)}", f"{apart:.0f} ms, {apart / max(live, 1):.1%}",
                     {"p50": "10 % or 5 ms", "p99": "10 % or 50 ms"}.get(name, ""))
        seconds = [outcome["replica_seconds_per_request"] for outcome in drawn]
        self.row("the same: replica-seconds for each request", f"live {sums[0] / len(trace):.3f}; simulated {statistics.median(seconds):.3f}", "", "")
        restores = [outcome["starts"]["restore"] for outcome in drawn]
        self.row("the same: restores", f"live {len(starts)}, {spread([start['took_ms'] for start in starts], 1)}; simulated {statistics.median(restores)}", "", "")

    def row(self, *cells):
        print("| " + " | ".join(cells) + " |", flush=True)

    def run(self):
        print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {platform.release()}, {self.options.rounds} rounds; medians, least and most; {told(self.options.own_mib)}\n")
        self.row("what", "measured", "figure", "goal")
        self.row("---", "---", "---", "---")
        parts = {
            "zero": lambda: self.rest("zero"),
            "store": lambda: self.rest("store"),
            "wake": lambda: self.rest("wake"),
            "burst": self.burst,
            "held": self.held,
            "keda": self.keda,
            "trace": self.replay,
        }
        for name, part in parts.items():
            if self.options.only in (None, name):
                part()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewarm", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--examples", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["zero", "store", "wake", "burst", "held", "keda", "trace"])
    parser.add_argument("--trace", type=pathlib.Path)
    parser.add_argument("--trace-seconds", type=float, default=600)
    add_flag(parser, 2048)
    options = parser.parse_args()
    end_by_signal()
    # The holder's connections and the gateway's.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        Bench(options).run()
    except Failed as failed:
        sys.exit(f"bench-serve: {failed}")


if __name__ == "__main__":
    main()
