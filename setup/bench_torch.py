"""The measurements of setup/bench-torch. Each prints one line of JSON: medians of rounds, and all rounds."""

import argparse
import ctypes
import datetime
import json
import os
import pathlib
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

from ended import end_by_signal

# GB/s from pinned host memory to an H200, and what the driver's restore of today reaches: its floor, and where it stands.
FLOORS = {"floor: copying from pinned memory": 53.0, "floor: the driver's copying as it is today": 9.8}
PR_SET_CHILD_SUBREAPER = 36
PORT = 8000
INSIDE, INSIDE_DEVICES = "/srv/gpu", "/srv/gpu-devices"


def fail(text):
    raise SystemExit(f"setup/bench-torch: {text}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port, path, body=None):
    """An answer, asked for until the server takes connections."""
    deadline = time.monotonic() + 600
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, headers={"content-type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return json.loads(response.read())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)


class Torch:
    """The transformer of examples/, with its weights on a GPU."""

    question = ("/generate", json.dumps({"prompt": "Once upon a time", "max_tokens": 16}).encode())
    ready, state = "/healthz", "/state_digest"

    def __init__(self, options):
        folder, weights = options.examples / "transformer", options.cache / "models" / f"transformer-{options.size}"
        make = [options.python, folder / "make_weights.py", "--size", options.size, "--out", weights]
        subprocess.run(make, check=True, stdout=sys.stderr)
        found = "import torch; print(torch.cuda.is_available())"
        said = subprocess.run([options.python, "-c", found], capture_output=True, text=True)
        if said.stdout.strip() != "True":
            fail(f"PyTorch of {options.python} has no CUDA device: {said.stderr.strip()[-200:] or 'is_available() is False'}")
        self.program = [options.python, folder / "server.py", "--device", "cuda", "--weights", weights / "model.safetensors"]
        self.run_flags = ["--gpu", options.gpu]
        self.env, self.outside_env = {}, {"CUDA_VISIBLE_DEVICES": options.gpu}
        query = ["nvidia-smi", f"--id={options.gpu}", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpu, memory, self.driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip().split(", ")
        self.machine = f"{gpu}, {memory}; {os.cpu_count()} CPUs, {platform.machine()}, Linux {platform.release()}"

    def command(self, port):
        return [*self.program, "--port", port]

    outside = command


class Simulated:
    """A server of gpu/sim under the simulated driver."""

    question = ("/generate", b"Once upon a time")
    ready, state = "/health", "/check"
    machine = driver = "simulated"

    def __init__(self, options):
        self.inside, self.mib = options.work / "inside", options.mib
        self.inside.mkdir()
        for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
            shutil.copy(options.target / "librewarm_gpu_sim.so", self.inside / name)
        shutil.copy(options.target / "gpu-workload", self.inside / "workload")
        device = options.devices / "0"
        device.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * options.mib + 16}m", "simulated", device], check=True)
        (device / "uuid").write_text(f"{0xD0:032x}")
        mounts = ["--mount", f"{self.inside}:{INSIDE}:ro", "--mount", f"{device}:{INSIDE_DEVICES}/0"]
        self.run_flags = [*mounts, "--env", f"REWARM_SIM_DEVICES={INSIDE_DEVICES}", "--env", "REWARM_SIM_NODES="]
        self.env = {
            "REWARM_LIBCUDA": str(self.inside / "libcuda.so.1"),
            "REWARM_LIBNVML": str(self.inside / "libnvidia-ml.so.1"),
            "REWARM_SIM_DEVICES": str(options.devices),
        }
        self.outside_env = self.env | {"REWARM_SIM_NODES": ""}
        # NVIDIA's program does not know this driver.
        stand_in = pathlib.Path(__file__).with_name("cuda_checkpoint.py")
        options.cuda_checkpoint = options.work / "cuda-checkpoint"
        options.cuda_checkpoint.write_text(f'#!/bin/sh\nexec /usr/bin/python3 -B "{stand_in}" "$@"\n')
        options.cuda_checkpoint.chmod(0o755)

    def command(self, port, inside=INSIDE):
        return [f"{inside}/workload", "--library", f"{inside}/libcuda.so.1", "--port", port, "--mib", self.mib, "--threads", 0]

    def outside(self, port):
        return self.command(port, self.inside)


def stages(reports):
    """What each stage took in milliseconds; of several rounds the median. Some go on beside each other."""
    took = {}
    for report in reports:
        for stage in report["stages"]:
            took.setdefault(stage["stage"], []).append(stage["took_ms"])
    return {stage: round(statistics.median(seen), 1) for stage, seen in took.items()}


class Bench:
    def __init__(self, options):
        self.options, self.work = options, options.work
        self.server = Simulated(options) if options.simulated else Torch(options)
        self.env = os.environ | self.server.env
        self.store = f"{self.work / 'store'}/server@v1"
        self.answers = []
        # Not known before the first pause.
        self.bytes = None

    def line(self, figure, seconds=None, **more):
        """One figure; of several rounds their median."""
        rounds = [round(one, 4) for one in seconds or []]
        measured = {"seconds": round(statistics.median(rounds), 4), "rounds": rounds} if rounds else {}
        about = {"device_bytes": self.bytes, "simulated": self.options.simulated, "machine": self.server.machine, "driver": self.server.driver}
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        print(json.dumps({"figure": figure, **measured, **more, **about, "date": date}), flush=True)

    def rewarm(self, *arguments):
        """What a command says as JSON, and how long it took."""
        command = [str(self.options.rewarm), "--state", str(self.work / "state"), "--json", *map(str, arguments)]
        began = time.monotonic()
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            fail(f"rewarm {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return json.loads(done.stdout), time.monotonic() - began

    def answer(self, port):
        """An answer of the server, kept to be compared with all others."""
        path, body = self.server.question
        self.answers.append(ask(port, path, body))

    def whole(self, port):
        """What all of its weights are, as they lie on the device. Not part of any time."""
        said = ask(port, self.server.state)
        return said.get("sha256") or said.get("sum")

    def run(self, name, port):
        self.rewarm(
            *("run", name, *self.server.run_flags, "--port", PORT, "--publish", f"127.0.0.1:{port}:{PORT}"),
            *("--ready", f"http://localhost{self.server.ready}", "--ready-timeout", "10m", "--", *self.server.command(PORT)),
        )

    def replica(self, name):
        return next(one for one in self.rewarm("ps")[0]["replicas"] if one["name"] == name)

    def stop(self, name):
        self.rewarm("stop", name)
        self.rewarm("rm", name)

    def cold(self):
        """Starts, the last of which is left running. The weights are in the page cache from the second on at the latest."""
        seen = []
        for turn in range(self.options.rounds):
            port, began = free_port(), time.monotonic()
            self.run("source", port)
            self.answer(port)
            seen.append(time.monotonic() - began)
            if turn + 1 < self.options.rounds:
                self.stop("source")
        self.line("cold start to first answer", seen)
        return port

    def pauses(self, port):
        pauses, wakes, answers = [], [], []
        for _ in range(self.options.rounds + 1):
            pauses.append(self.rewarm("pause", "source"))
            began = time.monotonic()
            wakes.append(self.rewarm("wake", "source"))
            self.answer(port)
            answers.append(time.monotonic() - began)
        # The first pause starts the helper, if nothing else has.
        for verb, seen in (("pause", pauses[1:]), ("wake", wakes[1:])):
            self.line(verb, [took for _, took in seen])
            self.line(f"{verb}, within the driver", [report["driver_seconds"] for report, _ in seen])
        self.line("wake to first answer", answers[1:])
        self.bytes = self.replica("source").get("device_bytes") or self.bytes

    def restores(self):
        report, seconds = self.rewarm("snapshot", "source", self.store)
        self.line("snapshot to a store in memory", [seconds])
        self.line("snapshot, by stage", stages_ms=stages([report]))
        digest = self.whole(self.port)
        self.stop("source")
        took, driver, digests, reports = [], [], [], []
        for turn in range(self.options.rounds + 1):
            name, port, began = f"clone-{turn}", free_port(), time.monotonic()
            published = f"127.0.0.1:{port}:{PORT}"
            reports.append(self.rewarm("restore", self.store, "--name", name, "--mode", "eager", "--publish", published)[0])
            self.answer(port)
            took.append(time.monotonic() - began)
            driver.append(self.replica(name).get("restore_driver_seconds", 0.0))
            digests.append(self.whole(port))
            self.stop(name)
        self.line("restore to first answer, the first of this machine", took[:1])
        self.line("restore to first answer, decoded in memory", took[1:])
        self.line("restore, within the driver", driver)
        self.line("restore, by stage, decoded in memory", stages_ms=stages(reports[1:]))
        same = sum(answer == self.answers[0] for answer in self.answers)
        self.line("answers equal", seen=same, of=len(self.answers))
        self.line("weights equal after a restore", seen=sum(one == digest for one in digests), of=len(digests))

    def floors(self):
        for figure, rate in FLOORS.items():
            self.line(figure, gigabytes_a_second=rate, would_take=round(self.bytes / 1e9 / rate, 4))

    def stock(self):
        """cuda-checkpoint and CRIU without Rewarm, of a process that is no container."""
        criu, toggle = self.options.criu, self.options.cuda_checkpoint
        missing = [name for name, found in (("CRIU", criu), ("cuda-checkpoint", toggle)) if not found]
        if missing:
            return self.line("cuda-checkpoint and CRIU", seen=f"not tried, no {' and no '.join(missing)}")
        dumps, restores, whole = [], [], []
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            for _ in range(self.options.rounds):
                dump, restore, same = self.stock_round(str(criu), str(toggle))
                dumps.append(dump)
                restores.append(restore)
                whole.append(same)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip()[-300:]
            return self.line("cuda-checkpoint and CRIU", seen=f"error: {' '.join(error.cmd[:2])}: {error.returncode}: {said}")
        self.line("cuda-checkpoint and CRIU: dump to memory", dumps)
        self.line("cuda-checkpoint and CRIU: restore to first answer", restores)
        self.line("cuda-checkpoint and CRIU: weights equal", seen=sum(whole), of=len(whole))

    def stock_round(self, criu, toggle):
        images, plugins, port = self.work / "images", self.work / "no-plugins", free_port()
        shutil.rmtree(images, ignore_errors=True)
        images.mkdir()
        plugins.mkdir(exist_ok=True)
        env = os.environ | self.server.outside_env
        null = subprocess.DEVNULL
        words = [str(word) for word in self.server.outside(port)]
        process = subprocess.Popen(words, env=env, stdin=null, stdout=null, stderr=null, start_new_session=True)
        pid = process.pid

        def run(*command):
            subprocess.run(command, env=env, check=True, stdin=null, stdout=null, stderr=subprocess.PIPE, text=True)

        def with_criu(verb, *arguments):
            common = ("--images-dir", str(images), "--libdir", str(plugins), "--log-file", f"{verb}.log", "--tcp-close")
            run(criu, verb, *common, "--network-lock=skip", "--manage-cgroups=ignore", "--file-locks", "--ghost-limit=1G", *arguments)

        try:
            self.answer(port)
            digest = self.whole(port)
            began = time.monotonic()
            run(toggle, "--toggle", "--pid", str(pid))
            with_criu("dump", "--tree", str(pid))
            dump = time.monotonic() - began
            process.wait()
            began = time.monotonic()
            with_criu("restore", "--restore-detached")
            run(toggle, "--toggle", "--pid", str(pid))
            self.answer(port)
            return dump, time.monotonic() - began, self.whole(port) == digest
        finally:
            # The first of that number, or the one that CRIU has restored under it, which became this process's child.
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass

    def all(self):
        self.port = self.cold()
        self.pauses(self.port)
        self.restores()
        self.floors()
        self.stock()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rewarm", "target", "work", "devices", "cache", "examples"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--mib", type=int, default=64, help="of the simulated server's weights")
    parser.add_argument("--size", default="8GiB", help="of the weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--python", type=pathlib.Path)
    parser.add_argument("--criu", type=pathlib.Path)
    parser.add_argument("--cuda-checkpoint", type=pathlib.Path)
    options = parser.parse_args()
    end_by_signal()
    options.python = options.python or options.cache / "venv/bin/python"
    own = [os.environ.get("REWARM_CRIU"), options.cache / "criu/sbin/criu", shutil.which("criu")]
    options.criu = options.criu or next((one for one in own if one and pathlib.Path(one).is_file()), None)
    options.cuda_checkpoint = options.cuda_checkpoint or shutil.which("cuda-checkpoint")
    Bench(options).all()


main()
