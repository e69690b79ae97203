"""Measures cold start, Rewarm, and stock runc with CRIU on the same servers, in turns, and prints a table for the README."""

import argparse
import http.client
import json
import os
import pathlib
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time

from demo import Failed, Rewarm, find, mib
from stock import Stock
from ended import end_by_signal
from settle import add_flag, settle, told

PORT = 8000
# Seconds before each measured step, unless said otherwise. The host of a virtual machine takes freed memory back within two
# seconds, and to get it again costs more than much of what is measured here: with a pause every step pays for that.
PAUSE = 4
DECODED_WITHIN = 60
# Between two snapshots of the same running server.
REQUESTS_BETWEEN = 100


class Server:
    """What is measured: how it is started, and the first question of a user."""

    def __init__(self, name, command, path, body, probe):
        self.name, self.command, self.probe = name, command, probe
        self.path, self.body = path, json.dumps(body)

    def ask(self, connection):
        request = http.client.HTTPConnection("127.0.0.1")
        request.sock = connection
        request.request("POST", self.path, self.body, {"content-type": "application/json"})
        answer = request.getresponse()
        text = answer.read()
        request.close()
        if answer.status != 200:
            raise Failed(f"{self.name} answers {answer.status}: {text[:200]!r}")
        return json.loads(text)

    def first_answer(self, output):
        return self.ask(socket.create_connection(("127.0.0.1", find(output, "host_port")), timeout=60))


class Figures:
    """Seconds and bytes by name, a value for each round."""

    def __init__(self):
        self.values = {}

    def add(self, name, value):
        self.values.setdefault(name, []).append(value)

    def median(self, name):
        return statistics.median(self.values[name])

    def seconds(self, name):
        values = self.values[name]
        return f"{self.median(name):.2f} s ({min(values):.2f} to {max(values):.2f})"


def resident_bytes(pid):
    """Of a process and its descendants, shared pages divided among those that share them."""
    total, left = 0, [pid]
    while left:
        pid = left.pop()
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
        for children in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            left += map(int, children.read_text().split())
    return total


def timed(function, *arguments):
    began = time.monotonic()
    result = function(*arguments)
    return result, time.monotonic() - began


class Bench:
    def __init__(self, options):
        self.options = options
        self.rewarm = Rewarm(options.rewarm, options.work / "state")

    def note(self, text):
        print(f"bench: {text}", file=sys.stderr, flush=True)

    def cold(self, server, figures):
        settle(self.options.pause, self.options.own_mib)
        began = time.monotonic()
        output, _ = self.rewarm(
            *("run", server.name, "--port", PORT, "--publish", f"127.0.0.1:0:{PORT}"),
            *("--ready", f"http://127.0.0.1:{PORT}/healthz", "--", *server.command),
        )
        self.started = output
        answer = server.first_answer(output)
        figures.add("cold", time.monotonic() - began)
        figures.add("resident", resident_bytes(output["pid"]))
        return answer

    def snapshot(self, server, figures, store):
        shutil.rmtree(store, ignore_errors=True)
        reference = f"{store}/{server.name}"
        settle(self.options.pause, self.options.own_mib)
        output, took = self.rewarm("snapshot", server.name, reference)
        figures.add("snapshot", took)
        self.digest = output["digest"]
        figures.add("frozen", output["frozen_ms"] / 1000)
        figures.add("stored", output["stored_bytes"])
        for _ in range(REQUESTS_BETWEEN):
            server.first_answer(self.started)
        again, _ = self.rewarm("snapshot", server.name, f"{reference}@again")
        figures.add("again", again["new_bytes"])
        # The questions of the probe are no part of what the stock arm does.
        self.rewarm("snapshot", server.name, f"{reference}@probed", "--probe", server.probe)
        self.remove(server)

    def restore(self, server, figures, reference, name):
        settle(self.options.pause, self.options.own_mib)
        began = time.monotonic()
        output, took = self.rewarm("restore", reference, "--publish", f"127.0.0.1:0:{PORT}")
        answer = server.first_answer(output)
        figures.add(f"{name} first", time.monotonic() - began)
        figures.add(name, took)
        self.remove(server)
        return answer

    def await_decoded(self):
        """What has been restored from a folder is decoded for the next restore when nobody waits."""
        deadline = time.monotonic() + DECODED_WITHIN
        while not any(stream["complete"] and stream["digest"] == self.digest for stream in self.rewarm("cache")[0].get("streams", [])):
            if time.monotonic() > deadline:
                raise Failed(f"nothing was decoded for later within {DECODED_WITHIN} s")
            time.sleep(0.1)

    def remove(self, server):
        self.rewarm("stop", server.name)
        self.rewarm("rm", server.name)

    def stock(self, server, figures, stock):
        settle(self.options.pause, self.options.own_mib)
        took, frozen, size = stock.dump()
        figures.add("stock dump", took)
        figures.add("stock frozen", frozen)
        figures.add("stock bytes", size)
        stock.end()
        settle(self.options.pause, self.options.own_mib)
        began = time.monotonic()
        took = stock.restore()
        answer = server.ask(stock.connect(PORT))
        figures.add("stock restore first", time.monotonic() - began)
        figures.add("stock restore", took)
        return answer

    def measure(self, server):
        figures = Figures()
        work = self.options.work / server.name
        store = work / "store"
        stock = Stock(work / "stock", f"bench-{server.name}-{os.getpid()}", server.command, self.options.criu)
        try:
            stock.start()
            answers = [server.ask(stock.connect(PORT))]
            for number in range(self.options.rounds):
                self.note(f"{server.name}: round {number + 1} of {self.options.rounds}")
                answers.append(self.cold(server, figures))
                self.snapshot(server, figures, store)
                answers.append(self.restore(server, figures, f"{store}/{server.name}", "restore"))
                answers.append(self.restore(server, figures, f"{store}/{server.name}@probed", "restore with probe"))
                self.await_decoded()
                answers.append(self.restore(server, figures, f"{store}/{server.name}", "restore again"))
                answers.append(self.stock(server, figures, stock))
                for verb in (("doctor",), ("ps",), ("inspect", f"{store}/{server.name}")):
                    figures.add(verb[0], timed(self.rewarm, *verb)[1])
            if any(answer != answers[0] for answer in answers):
                raise Failed(f"{server.name} does not give the same answer each time")
        finally:
            stock.close()
            shutil.rmtree(work / "stock", ignore_errors=True)
        return figures


def rows(server, figures):
    median = figures.median

    def ratio(above, below):
        return f"{median(above) / median(below):.2f}"

    quick = ", ".join(f"{verb} {median(verb) * 1000:.0f} ms" for verb in ("doctor", "ps", "inspect"))
    return [
        ("first answer, cold start", figures.seconds("cold"), ""),
        ("first answer, restored", figures.seconds("restore first"), f"{ratio('cold', 'restore first')} times sooner than cold"),
        (
            "first answer, restored, after the whole probe",
            figures.seconds("restore with probe first"),
            f"{ratio('cold', 'restore with probe first')} times sooner than cold",
        ),
        (
            "first answer, second restore on the machine, which holds it decoded",
            figures.seconds("restore again first"),
            f"{ratio('cold', 'restore again first')} times sooner than cold",
        ),
        ("`rewarm restore`, whole", figures.seconds("restore"), f"{ratio('restore', 'stock restore')} times `runc restore`"),
        ("`runc restore` of the same server", figures.seconds("stock restore"), ""),
        ("`rewarm snapshot`, whole", figures.seconds("snapshot"), f"{ratio('snapshot', 'stock dump')} times the next line"),
        ("`runc checkpoint`, then tar and zstd -1", figures.seconds("stock dump"), mib(median("stock bytes"))),
        ("frozen, Rewarm", figures.seconds("frozen"), f"{ratio('frozen', 'stock frozen')} times the next line"),
        ("frozen, CRIU with images in a folder", figures.seconds("stock frozen"), ""),
        ("in the store", mib(median("stored")), f"{ratio('stored', 'resident')} of {mib(median('resident'))} resident"),
        (
            f"new in the store, second snapshot after {REQUESTS_BETWEEN} requests",
            mib(median("again")),
            f"{ratio('again', 'stored')} of the first",
        ),
        ("quick verbs", quick, ""),
    ]


def machine():
    model = next(
        (line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} cores of {model}, Linux {platform.release()}"


def servers(options):
    embedding, transformer = options.examples / "embedding", options.examples / "transformer"
    weights = options.models / f"transformer-{options.size}"
    subprocess.run(
        [options.python, transformer / "make_weights.py", "--size", options.size, "--out", weights], check=True, stdout=sys.stderr
    )
    start = (options.python, transformer / "server.py", "--port", PORT, "--weights", weights / "model.safetensors")
    question = {"prompt": "Hello", "max_tokens": 1}
    return {
        "embedding": Server(
            *("embedding", (options.python, embedding / "server.py", "--port", PORT)),
            *("/embed", {"texts": ["hello world"]}, embedding / "probe.toml"),
        ),
        "transformer": Server("transformer", start, "/generate", question, transformer / "probe.toml"),
    }


def main():
    parser = argparse.ArgumentParser()
    for name in ("rewarm", "criu", "work", "python", "examples", "models"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", default="1GiB", help="of the transformer's weights")
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds before each step")
    parser.add_argument("--only", choices=("embedding", "transformer"))
    add_flag(parser, 3072)
    options = parser.parse_args()
    end_by_signal()

    bench = Bench(options)
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}; medians of {options.rounds} rounds in turns (least to most), each step after {options.pause:g} s; {told(options.own_mib)}")
    try:
        for name, server in servers(options).items():
            if options.only in (None, name):
                figures = bench.measure(server)
                title = name if name == "embedding" else f"{name}, {options.size}"
                print(f"\n| {title} | | |\n|---|---|---|")
                for row in rows(server, figures):
                    print(f"| {' | '.join(row)} |", flush=True)
                (options.work / f"{name}.json").write_text(json.dumps(figures.values))
    except (Failed, subprocess.CalledProcessError) as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
