"""The loop of setup/soak.

Each turn starts a server cold, then takes it through some generations: snapshot, restore, snapshot of what was restored, and
so on. Half of all commands are killed (SIGKILL) at a random moment. After each step one of these must hold:

- a snapshot was published, whole: it restores, and the server answers its own check;
- a snapshot was not published: the server goes on and answers its check;
- a restore was killed: nothing of it is left.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request

PORT = 8000
PYTHON = ("/usr/bin/python3", "-B")
SERVERS = {
    "tree": (*PYTHON, "tree.py", "--shared-mib", "8", "--shm-mib", "32"),
    "clock": (*PYTHON, "clock.py"),
    "helper": (*PYTHON, "helper.py"),
    "memory": (*PYTHON, "memory.py", "--mib", "96", "--fork", "--churn", "mprotect,mremap,madvise,mmap,heap"),
    "ghost": (*PYTHON, "ghost.py"),
    "nginx": ("sh", "nginx.sh"),
    "node": ("node", "node.js"),
}
GENERATIONS_MAX = 4
# The moment of a kill lies within so many times what the command took the last time, so that few kills come too late.
KILL_WITHIN = 1.1
# And within this while it has never come to its end.
KILL_AFTER_SECONDS_FIRST = 0.3
SETTLE_SECONDS_MAX = 30


class Wrong(Exception):
    """A promise is broken."""


class Soak:
    def __init__(self, options):
        self.options = options
        self.random = random.Random(options.seed)
        self.state = options.work / "state"
        # A name that no other process of the machine has on its command line.
        self.inside = f"/srv/{options.work.name}"
        self.counts = {}
        self.steps = []
        # By verb, in seconds.
        self.took = {}

    def count(self, what):
        self.counts[what] = self.counts.get(what, 0) + 1

    def start(self, *arguments):
        if arguments[0] != "ps":
            self.steps.append(" ".join(map(str, arguments)))
        command = [str(self.options.rewarm), "--state", str(self.state), "--json", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def rewarm(self, *arguments):
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=300)
        if process.returncode != 0:
            raise Wrong(f"rewarm {' '.join(map(str, arguments))} ends with {process.returncode}: {errors.strip()}")
        return json.loads(output)

    def maybe_killed(self, *arguments):
        """The output, or None where the command was killed before it ended."""
        verb, began = arguments[0], time.monotonic()
        if self.random.random() < 0.5:
            output = self.rewarm(*arguments)
            self.took[verb] = time.monotonic() - began
            return output
        process = self.start(*arguments)
        seconds = self.random.uniform(0, KILL_WITHIN * self.took.get(verb, KILL_AFTER_SECONDS_FIRST))
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self.steps[-1] += f" (killed after {seconds:.3f} s)"
            self.count(f"{verb} killed")
            return None
        if process.returncode != 0:
            raise Wrong(f"rewarm {' '.join(map(str, arguments))} ends with {process.returncode}: {errors.strip()}")
        return json.loads(output)

    def replicas(self):
        return {replica["name"]: replica for replica in self.rewarm("ps")["replicas"]}

    def states(self):
        return [replica["status"] for replica in self.replicas().values()]

    def check(self, name):
        """The server answers its own check, through the port that is published."""
        port = self.replicas()[name]["publish"][0]["host_port"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/check", timeout=60) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            raise Wrong(f"{name}: {error.read().decode()}") from error
        except OSError as error:
            raise Wrong(f"{name} does not answer: {error}") from error

    def residue(self):
        """What is left of replicas, besides those that run."""
        left = [f"replica {name}" for name in self.replicas()]
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            if self.inside in line or (str(self.state) in line and " ps" not in line):
                left.append(f"process {process.name}: {line[:120]}")
        mounts = pathlib.Path("/proc/self/mountinfo").read_text()
        left += [f"mount {line.split()[4]}" for line in mounts.splitlines() if str(self.options.work) in line]
        return left

    def settles(self, what, holds):
        end = time.monotonic() + SETTLE_SECONDS_MAX
        while (seen := holds()):
            if time.monotonic() > end:
                raise Wrong(f"{what}: after {SETTLE_SECONDS_MAX} s there is still {seen}")
            time.sleep(0.1)

    def snapshot(self, name, reference):
        """Takes snapshots until one is published. True where the server was stopped by it."""
        while True:
            stop = self.random.random() < 0.5
            output = self.maybe_killed("snapshot", name, reference, *(["--stop"] if stop else []))
            if output is not None:
                self.count("snapshot")
                return stop
            # Killed. The server goes on, unless it was to be stopped and the snapshot is there.
            if stop:
                time.sleep(1)
                if name not in self.replicas():
                    self.rewarm("inspect", reference)
                    self.count("snapshot published although killed")
                    return True
            self.check(name)

    def restore(self, name, reference):
        while True:
            output = self.maybe_killed("restore", reference, "--name", name, "--publish", f"127.0.0.1:0:{PORT}")
            if output is not None:
                self.count("restore")
                return
            # Killed after it committed: the replica lives on by itself. Else nothing may be left.
            self.settles("a killed restore", lambda: [state for state in self.states() if state != "ready"])
            if name in self.replicas():
                self.check(name)
                self.count("restore committed although killed")
                return
            self.settles("a killed restore", self.residue)

    def turn(self, number):
        name = self.random.choice(self.options.only or sorted(SERVERS))
        self.steps = []
        replica, store = f"{name}-{number}", self.options.work / "store"
        words = [f"{self.inside}/{word}" if word.endswith((".py", ".js", ".sh")) else word for word in SERVERS[name]]
        if name == "nginx":
            words += ["--prefix", f"/tmp{self.inside}"]
        self.rewarm(
            *("run", replica, "--mount", f"{self.options.fixtures}:{self.inside}:ro", "--port", PORT),
            *("--publish", f"127.0.0.1:0:{PORT}", "--ready", f"http://127.0.0.1:{PORT}/healthz", "--"),
            *(*words, "--port", PORT),
        )
        for generation in range(self.random.randint(1, GENERATIONS_MAX)):
            reference = f"{store}/{name}@turn-{number}-{generation}"
            if not self.snapshot(replica, reference):
                self.check(replica)
                self.rewarm("stop", replica)
            self.settles("a stopped server", self.residue)
            self.restore(replica, reference)
            self.check(replica)
        self.rewarm("stop", replica)
        self.settles("a stopped server", self.residue)
        self.count(f"turns of {name}")

    def run(self):
        began, number = time.monotonic(), 0
        while time.monotonic() - began < self.options.minutes * 60:
            number += 1
            self.turn(number)
            print(f"soak: turn {number}, {(time.monotonic() - began) / 60:.1f} min, {json.dumps(self.counts)}", flush=True)
            # Stores are not what this is about, and would fill the disk.
            subprocess.run(["rm", "-rf", self.options.work / "store"], check=True)
        return number, time.monotonic() - began


def main():
    parser = argparse.ArgumentParser()
    for name in ("rewarm", "work", "fixtures"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--only", action="append", choices=sorted(SERVERS))
    parser.add_argument("--record", type=pathlib.Path)
    options = parser.parse_args()
    print(f"soak: seed {options.seed}, {options.minutes:g} minutes", flush=True)

    soak = Soak(options)
    failure = None
    try:
        soak.run()
    except Wrong as error:
        failure = str(error)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "kernel": os.uname().release,
        "minutes": options.minutes,
        "seed": options.seed,
        "counts": dict(sorted(soak.counts.items())),
        "failure": failure,
        "steps": soak.steps if failure else [],
    }
    if options.record:
        options.record.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    if failure:
        sys.exit(f"soak: {failure}")


if __name__ == "__main__":
    main()
