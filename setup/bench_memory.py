"""What setup/bench-memory measures, one class for each part of its table."""

import argparse
import contextlib
import http.client
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time

from bench import PAUSE, PORT, REQUESTS_BETWEEN, Figures, Server, machine
from demo import Failed, Rewarm, find, mib
from stock import Stock, run
from ended import end_by_signal
from settle import add_flag, settle, told

SERVER = pathlib.Path(__file__).with_name("bench_memory_server.py")
MODEL = "1GiB"
REPLICAS = 8
REPLICA_MIB = 512
KIND_MIB = 1024
# The closed loop that finds a server's peak rate, and how long it is loaded before and after a freeze.
PEAK_SECONDS = 3
LOADED_SECONDS = 1
PEAK_CLIENTS = 2
PRESENT_SECONDS_MAX = 300
LOOK_SECONDS = 0.005


def memory_server(name, *flags):
    """A server of bench_memory_server.py, whose question is the checksum of its memory."""
    return Server(name, ("/usr/bin/python3", "-B", SERVER, "--port", PORT, *flags), "/", None, None)


class State:
    """Rewarm with a state folder. Restores from a new one are the first of their machine."""

    def __init__(self, options, name):
        self.rewarm = Rewarm(options.rewarm, options.work / name)
        self.names = []

    def start(self, server, *flags):
        """Starts a server cold and gives its port on the machine."""
        ready = f"http://127.0.0.1:{PORT}/healthz"
        publish = ("--port", PORT, "--publish", f"127.0.0.1:0:{PORT}")
        output, _ = self.rewarm("run", server.name, *publish, *flags, "--ready", ready, "--", *server.command)
        self.names.append(server.name)
        return find(output, "host_port")

    def restore(self, reference, *flags):
        """What it printed, and when the command began."""
        began = time.monotonic()
        output, _ = self.rewarm("restore", reference, "--publish", f"127.0.0.1:0:{PORT}", *flags)
        self.names += [replica["name"] for replica in output["replicas"]]
        return output, began

    def present(self):
        """Waits until all memory of all replicas is in place."""
        end = time.monotonic() + PRESENT_SECONDS_MAX
        while any(replica["memory"] != "present" for replica in self.rewarm("ps")[0]["replicas"]):
            if time.monotonic() > end:
                raise Failed(f"memory is not complete within {PRESENT_SECONDS_MAX} s")
            time.sleep(LOOK_SECONDS)

    def read_bytes(self):
        """Bytes that came from stores, once all that is on its way has arrived."""
        end = time.monotonic() + PRESENT_SECONDS_MAX
        while True:
            cache = self.rewarm("cache")[0]
            if all(stream["complete"] for stream in cache.get("streams", [])):
                return cache["read_bytes"]
            if time.monotonic() > end:
                raise Failed(f"the fetch does not end within {PRESENT_SECONDS_MAX} s")
            time.sleep(LOOK_SECONDS)

    def remove(self):
        while self.names:
            name = self.names.pop()
            self.rewarm("stop", name, "--timeout", "0s")
            self.rewarm("rm", name)


class Load:
    """Asks a server at a steady rate, each question over a connection of its own, as long as the block lasts."""

    def __init__(self, server, connect, rate):
        self.server, self.connect, self.interval = server, connect, 1 / rate
        self.ended = threading.Event()
        self.asked = self.failed = 0
        self.threads = []

    def ask(self):
        try:
            self.server.ask(self.connect())
        except (OSError, http.client.HTTPException, Failed):
            self.failed += 1

    def pace(self):
        due = time.monotonic()
        while not self.ended.wait(max(0, due - time.monotonic())):
            thread = threading.Thread(target=self.ask)
            thread.start()
            self.threads.append(thread)
            self.asked += 1
            due += self.interval

    def __enter__(self):
        self.pacer = threading.Thread(target=self.pace)
        self.pacer.start()
        time.sleep(LOADED_SECONDS)
        return self

    def __exit__(self, *error):
        time.sleep(LOADED_SECONDS)
        self.ended.set()
        for thread in [self.pacer, *self.threads]:
            thread.join()


def peak_rate(server, connect):
    """Answers a second of some clients that ask again as soon as they are answered."""
    end, count = time.monotonic() + PEAK_SECONDS, [0] * PEAK_CLIENTS

    def client(number):
        while time.monotonic() < end:
            server.ask(connect())
            count[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(PEAK_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(count) / PEAK_SECONDS


def local(port):
    return socket.create_connection(("127.0.0.1", port), timeout=60)


class Part:
    """Some rows of the table: what is made once, and what is measured in each round."""

    def __init__(self, options, figures, stack):
        self.options, self.figures, self.stack = options, figures, stack
        self.count = 0
        self.source = self.state("source")

    def state(self, name):
        # A short name: sockets lie below, and their paths may have 107 bytes.
        state = State(self.options, f"{type(self).__name__.lower()}-{name}")
        self.stack.callback(state.remove)
        return state

    def fresh(self):
        """A state folder in which nothing was restored, after a pause."""
        settle(PAUSE, self.options.own_mib)
        self.count += 1
        return self.state(self.count)

    def stock(self, server, number=0, images=None):
        folder = self.options.work / f"stock-{server.name}-{number}"
        stock = Stock(folder, f"bench-{server.name}-{number}-{os.getpid()}", server.command, self.options.criu, images)
        self.stack.callback(stock.close)
        return stock

    def snapshot(self, server, store, *flags):
        """Into a folder that is empty, raw. What the command printed, and how long it took."""
        shutil.rmtree(self.options.work / store, ignore_errors=True)
        return self.source.rewarm("snapshot", server.name, self.reference(server, store), "--compression", "none", *flags)

    def reference(self, server, store):
        return f"{self.options.work / store}/{server.name}"

    def median(self, name):
        return self.figures.median(name)

    def ms(self, name):
        values = self.figures.values[name]
        return f"{statistics.median(values) * 1000:.0f} ms ({min(values) * 1000:.0f} to {max(values) * 1000:.0f})"

    def times(self, above, below):
        return f"{self.median(above) / self.median(below):.2f}"


class Fixed(Part):
    """A process of 10 MB: all that a restore costs but its bytes."""

    def make(self):
        server = memory_server("small")
        self.source.start(server)
        self.snapshot(server, "small")
        self.source.remove()
        self.reference_small = self.reference(server, "small")
        self.other = self.stock(server)
        self.other.start()
        server.ask(self.other.connect(PORT))
        self.other.dump()
        self.other.end()

    def round(self):
        state = self.fresh()
        for name in ("first", "again"):
            output, began = state.restore(self.reference_small)
            self.figures.add(f"fixed {name}", time.monotonic() - began)
            for stage in output["stages"]:
                self.figures.add(f"fixed {name} {stage['stage']}", stage["took_ms"] / 1000)
            state.remove()
            settle(PAUSE, self.options.own_mib)
        self.figures.add("fixed stock", self.other.restore())
        self.other.end()

    def stages(self, name):
        prefix = f"fixed {name} "
        stages = [key.removeprefix(prefix) for key in self.figures.values if key.startswith(prefix)]
        return ", ".join(f"{stage} {self.median(prefix + stage) * 1000:.0f}" for stage in stages)

    def rows(self):
        stock = self.ms("fixed stock")
        again = f"{self.times('fixed again', 'fixed stock')}; stages: {self.stages('again')}"
        first = f"{self.times('fixed first', 'fixed stock')}; stages: {self.stages('first')}"
        return [
            ("`rewarm restore` of 10 MB to ready, fetcher runs; against `runc restore`", self.ms("fixed again"), stock, again, "80 ms"),
            ("the same, and the fetcher is started by it", self.ms("fixed first"), stock, first, ""),
        ]


class Eight(Part):
    """Replicas of one snapshot at once, against one after another."""

    def make(self):
        server = memory_server("eight", "--mib", REPLICA_MIB)
        self.source.start(server)
        self.snapshot(server, "eight")
        self.source.remove()
        self.server, self.reference_eight = server, self.reference(server, "eight")
        images = self.options.work / "eight-images"
        self.others = [self.stock(server, number, images) for number in range(REPLICAS)]
        first = self.others[0]
        first.start()
        self.answer = server.ask(first.connect(PORT))
        first.dump()
        first.end()

    def round(self):
        state = self.fresh()
        state.restore(self.reference_eight)
        state.present()
        self.figures.add("one bytes", state.read_bytes())
        state.remove()
        state = self.fresh()
        output, began = state.restore(self.reference_eight, "--count", REPLICAS)
        ports = [find(replica, "host_port") for replica in output["replicas"]]
        for port in ports:
            local(port).close()
        self.figures.add("eight listening", time.monotonic() - began)
        state.present()
        self.figures.add("eight present", time.monotonic() - began)
        self.figures.add("eight bytes", state.read_bytes())
        if any(self.server.ask(local(port)) != self.answer for port in ports):
            raise Failed("a replica holds other memory than its server did")
        state.remove()
        settle(PAUSE, self.options.own_mib)
        began = time.monotonic()
        for other in self.others:
            other.restore()
        self.others[-1].connect(PORT).close()
        self.figures.add("eight stock", time.monotonic() - began)
        for other in self.others:
            other.end()

    def rows(self):
        stock = self.ms("eight stock")
        sooner = f"{self.times('eight stock', 'eight listening')} times sooner"
        present = f"{self.times('eight stock', 'eight present')} times sooner"
        what = f"{REPLICAS} replicas of {REPLICA_MIB} MiB"
        read = (mib(self.median("eight bytes")), f"one: {mib(self.median('one bytes'))}", self.times("eight bytes", "one bytes"))
        return [
            (f"{what}: last one listening, against one after another", self.ms("eight listening"), stock, sooner, "5 times"),
            ("the same, all memory present", self.ms("eight present"), stock, present, ""),
            (f"{what}: bytes read from the store", *read, "1.1 times"),
        ]


class Kinds(Part):
    """The same memory, private, shared and in `/dev/shm`."""

    NAMES = ("private", "shared", "shm")

    def make(self):
        self.answers = {}
        self.servers = [memory_server(kind, "--mib", KIND_MIB, "--kind", kind) for kind in self.NAMES]
        for server in self.servers:
            self.answers[server.name] = server.ask(local(self.source.start(server)))

    def round(self):
        for server in self.servers:
            settle(PAUSE, self.options.own_mib)
            output, took = self.snapshot(server, "kinds")
            self.figures.add(f"{server.name} snapshot", took)
            self.figures.add(f"{server.name} frozen", output["frozen_ms"] / 1000)
            state = self.fresh()
            output, began = state.restore(self.reference(server, "kinds"))
            self.figures.add(f"{server.name} ready", time.monotonic() - began)
            state.present()
            self.figures.add(f"{server.name} present", time.monotonic() - began)
            if server.ask(local(find(output, "host_port"))) != self.answers[server.name]:
                raise Failed(f"{server.name} memory is another one in the replica")
            state.remove()

    def rows(self):
        rows = []
        for kind, place in (("shared", "shared memory"), ("shm", "`/dev/shm`")):
            for figure, goal in (("present", "2.5 times"), ("frozen", "1.3 times")):
                name = f"1 GiB in {place}: restore until present" if figure == "present" else "the same: freeze of the dump"
                cells = (self.ms(f"{kind} {figure}"), f"private: {self.ms(f'private {figure}')}")
                rows.append((name, *cells, self.times(f"{kind} {figure}", f"private {figure}"), goal))
            rows.append(("the same: whole snapshot", self.ms(f"{kind} snapshot"), f"private: {self.ms('private snapshot')}", "", ""))
        return rows


def transformer(options, name, *flags):
    weights = options.models / f"transformer-{MODEL}"
    example = options.examples / "transformer"
    made = (options.python, example / "make_weights.py", "--size", MODEL, "--out", weights)
    subprocess.run([str(word) for word in made], check=True, stdout=sys.stderr)
    start = (options.python, example / "server.py", "--port", PORT, "--weights", weights / "model.safetensors", *flags)
    return Server(name, start, "/generate", {"prompt": "Hello", "max_tokens": 1}, example / "probe.toml")


class Sparse(Part):
    """A model whose answer reads a tenth of its weights, its working set recorded."""

    def make(self):
        self.server = transformer(self.options, "sparse", "--touch", "sparse")
        port = self.source.start(self.server)
        self.answer = self.server.ask(local(port))
        for _ in range(9):
            began = time.monotonic()
            self.server.ask(local(port))
            self.figures.add("sparse running", time.monotonic() - began)
        self.snapshot(self.server, "sparse", "--probe", self.server.probe)
        self.source.remove()
        # The first restore records.
        state = self.fresh()
        state.restore(self.reference(self.server, "sparse"), "--mode", "lazy")
        state.present()
        state.remove()
        # None is recorded where all of it is there soon.
        extents = []
        for found in sorted((self.options.work / "sparse/working-sets").glob("*/*.json")):
            extents = json.loads(found.read_text())["extents"]
        self.figures.add("sparse working set", sum(extent[2] for extent in extents))

    def round(self):
        state = self.fresh()
        output, began = state.restore(self.reference(self.server, "sparse"), "--no-probe")
        answer = self.server.ask(local(find(output, "host_port")))
        self.figures.add("sparse first", time.monotonic() - began - self.median("sparse running"))
        if answer != self.answer:
            raise Failed("the replica of the sparse model answers otherwise")
        state.present()
        self.figures.add("sparse present", time.monotonic() - began)
        state.remove()

    def rows(self):
        own = f"own answer: {self.ms('sparse running')}"
        recorded = self.median("sparse working set")
        size = f"recorded working set: {mib(recorded)}" if recorded else "no working set recorded"
        return [
            (f"sparse {MODEL}: first answer less its own answer time", self.ms("sparse first"), own, size, "150 ms"),
            ("the same: all memory present", self.ms("sparse present"), "", "", ""),
        ]


class Snapshot(Part):
    """A dense model: freeze under load, and the whole snapshot."""

    def make(self):
        self.server = transformer(self.options, "dense")
        self.port = self.source.start(self.server)
        memory = self.options.work / "memory"
        memory.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=4g", "bench-memory", memory)
        self.other = self.stock(self.server, images=memory / "images")
        self.other.start()
        self.server.ask(self.other.connect(PORT))
        self.peak = peak_rate(self.server, lambda: local(self.port))
        if not self.peak:
            raise Failed(f"{self.server.name} answers nothing within {PEAK_SECONDS} s")

    @contextlib.contextmanager
    def loaded(self, connect, name):
        settle(PAUSE, self.options.own_mib)
        with Load(self.server, connect, self.peak / 3) as load:
            yield
        self.figures.add(f"{name} asked", load.asked)
        self.figures.add(f"{name} failed", load.failed)

    def round(self):
        with self.loaded(lambda: local(self.port), "loaded"):
            output, _ = self.snapshot(self.server, "loaded")
            self.figures.add("loaded frozen", output["frozen_ms"] / 1000)
        with self.loaded(lambda: self.other.connect(PORT), "loaded stock"):
            self.figures.add("loaded stock frozen", self.other.dump()[1])
        settle(PAUSE, self.options.own_mib)
        self.figures.add("whole", self.snapshot(self.server, "whole")[1])
        settle(PAUSE, self.options.own_mib)
        self.figures.add("whole stock", self.other.dump()[0])

    def rows(self):
        failed = [f"{sum(self.figures.values[f'{name} {what}']):.0f}" for name in ("loaded", "loaded stock") for what in ("failed", "asked")]
        ratio = self.times("loaded frozen", "loaded stock frozen")
        sooner = f"{self.times('whole stock', 'whole')} times sooner"
        what = f"dense {MODEL} at {self.peak / 3:.1f} requests/s: freeze, against `runc checkpoint` to tmpfs"
        requests = (f"{failed[0]} of {failed[1]}", f"{failed[2]} of {failed[3]}")
        return [
            (what, self.ms("loaded frozen"), self.ms("loaded stock frozen"), ratio, "0.4 times"),
            ("the same: requests that failed", *requests, "", "none"),
            ("whole snapshot to a folder, against tmpfs + `zstd -1 -T0`", self.ms("whole"), self.ms("whole stock"), sooner, "2 times"),
        ]


class Again(Part):
    """What a snapshot adds to a store that has one of the same server: later, and of another start."""

    def make(self):
        example = self.options.examples / "embedding"
        command = (self.options.python, example / "server.py", "--port", PORT)
        self.server = Server("embedding", command, "/embed", {"texts": ["hello world"]}, None)

    def start(self):
        port = self.source.start(self.server, "--deterministic")
        self.server.ask(local(port))
        return port

    def add(self, store, tag):
        """Snapshots into a store, in the codec that it chooses itself."""
        return self.source.rewarm("snapshot", self.server.name, f"{self.reference(self.server, store)}@{tag}")[0]

    def round(self):
        for store in ("starts", "requests"):
            shutil.rmtree(self.options.work / store, ignore_errors=True)
        self.start()
        self.figures.add("again first", self.add("starts", "first")["stored_bytes"])
        self.source.remove()
        port = self.start()
        self.figures.add("again start", self.add("starts", "second")["new_bytes"])
        self.add("requests", "first")
        for _ in range(REQUESTS_BETWEEN):
            self.server.ask(local(port))
        self.figures.add("again requests", self.add("requests", "second")["new_bytes"])
        self.source.remove()

    def rows(self):
        def row(what, name, goal):
            values = self.figures.values[name]
            new = f"{mib(self.median(name))} ({mib(min(values))} to {mib(max(values))})"
            share = f"{self.median(name) / self.median('again first') * 100:.1f} % of the first"
            return (f"embedding server: new in a second snapshot {what}", new, f"first: {mib(self.median('again first'))}", share, goal)

        return [
            row(f"after {REQUESTS_BETWEEN} requests", "again requests", "5 %"),
            row("of a second `--deterministic` start", "again start", "15 %"),
        ]


PARTS = {"fixed": Fixed, "eight": Eight, "kinds": Kinds, "sparse": Sparse, "snapshot": Snapshot, "again": Again}


def measure(options, name, figures):
    """Rounds of one part, and its rows. Its servers are there only meanwhile."""
    with contextlib.ExitStack() as stack:
        part = PARTS[name](options, figures, stack)
        part.make()
        for number in range(options.rounds):
            print(f"bench-memory: {name}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            part.round()
        return part.rows()


def main():
    parser = argparse.ArgumentParser()
    for name in ("rewarm", "criu", "work", "python", "examples", "models"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given several times")
    add_flag(parser, 6144)
    options = parser.parse_args()
    end_by_signal()
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}; medians of {options.rounds} rounds in turns (least to most); {told(options.own_mib)}\n")
    print("| figure | Rewarm | stock | | goal |\n|---|---|---|---|---|", flush=True)
    figures = Figures()
    try:
        for name in options.only or PARTS:
            for row in measure(options, name, figures):
                print(f"| {' | '.join(row)} |", flush=True)
    except (Failed, subprocess.CalledProcessError) as error:
        sys.exit(f"bench-memory: {error}")


if __name__ == "__main__":
    main()
