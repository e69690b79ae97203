"""The measurements of setup/bench-gpu. All of them are of a simulated driver, and say so."""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess

from ended import end_by_signal
from settle import add_flag, settle, told

PORT = 8000
INSIDE, INSIDE_DEVICES = "/srv/gpu", "/srv/gpu-devices"


class Bench:
    def __init__(self, options):
        self.options, self.work = options, options.work
        self.state, self.inside = self.work / "state", self.work / "inside"
        self.inside.mkdir()
        for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
            shutil.copy(options.target / "librewarm_gpu_sim.so", self.inside / name)
        shutil.copy(options.target / "gpu-workload", self.inside / "workload")
        device = options.devices / "0"
        device.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6g", "simulated", str(device)], check=True)
        (device / "uuid").write_text(f"{0xD0:032x}")
        self.control = self.work / "control"
        self.env = os.environ | {
            "REWARM_SIM_CONTROL": str(self.control),
            "REWARM_LIBCUDA": str(self.inside / "libcuda.so.1"),
            "REWARM_LIBNVML": str(self.inside / "libnvidia-ml.so.1"),
            "REWARM_SIM_DEVICES": str(options.devices),
            # With custom storage.
            "REWARM_SIM_VERSION": "13040",
        }

    def rewarm(self, *arguments):
        command = [str(self.options.rewarm), "--state", str(self.state), "--json", *map(str, arguments)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=200)
        if done.returncode != 0:
            raise SystemExit(f"bench-gpu: rewarm {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def start(self, name, command, *more):
        mounts = ["--mount", f"{self.inside}:{INSIDE}:ro", "--mount", f"{self.options.devices / '0'}:{INSIDE_DEVICES}/0"]
        env = ["--env", f"REWARM_SIM_DEVICES={INSIDE_DEVICES}", "--env", "REWARM_SIM_NODES="]
        self.rewarm("run", name, *mounts, *env, *more, "--port", PORT, "--ready", "http://localhost/health", "--ready-timeout", "3m", "--", *command)

    def workload(self, mib, port=PORT, more=""):
        return f"{INSIDE}/workload --library {INSIDE}/libcuda.so.1 --port {port} --mib {mib} --threads 0 {more}"

    def stop(self, name):
        self.rewarm("stop", name)
        self.rewarm("rm", name)

    def pauses(self, processes):
        """Medians of our share of pause and wake, in seconds: all but the time within the driver's calls."""
        ports = range(PORT, PORT + processes)
        servers = " & ".join(self.workload(16, port) for port in reversed(ports))
        name = f"pause-{processes}"
        self.start(name, ["sh", "-c", f"{servers} & wait"])
        shares = {"pause": [], "wake": []}
        for turn in range(self.options.rounds + 1):
            for verb, seen in shares.items():
                report = self.rewarm(verb, name)
                # The first pause starts the helper.
                if turn > 0:
                    seen.append(report["seconds"] - report["driver_seconds"])
        self.stop(name)
        return {verb: statistics.median(seen) for verb, seen in shares.items()}

    def keep(self, name, more, *flags):
        """A snapshot of a server, which ends."""
        # A real driver's copying takes no processor, and is faster than this machine's: pages are moved, and the rate is waited for.
        moves = ("--env", "REWARM_SIM_MOVES=1")
        self.start(name, ["sh", "-c", f"exec {self.workload(self.options.mib, more=more)}"], *moves)
        reference = f"{self.work / 'store'}/{name}@v1"
        self.rewarm("snapshot", name, reference, "--stop", *flags)
        self.rewarm("rm", name)

    def restores(self, names, rate):
        """For each snapshot, in turns: the times to ready less those within the driver, in seconds, and the driver's.

        The driver's restore call moves at most `rate` GB a second, or as much as it can with 0."""
        self.control.write_text(f"restore rate {round(rate * 1e9 / 2**20)}\n" if rate else "")
        seen = {name: ([], []) for name in names}
        for turn, name in ((turn, name) for turn in range(self.options.rounds + 1) for name in names):
            reference, (ours, driver) = f"{self.work / 'store'}/{name}@v1", seen[name]
            settle(0, self.options.own_mib)
            report = self.rewarm("restore", reference, "--name", name, "--mode", "eager")
            listed = self.rewarm("ps")["replicas"]
            spent = next(one for one in listed if one["name"] == name).get("restore_driver_seconds", 0.0)
            # The first decodes; the others find it decoded in memory.
            if turn > 0:
                ours.append(report["replicas"][0]["ready_ms"] / 1000 - spent)
                driver.append(spent)
            self.stop(name)
        return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rewarm", "target", "work", "devices"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--only", choices=["pauses", "restores"])
    parser.add_argument("--rates", type=float, nargs="+", default=[5, 9.8, 0], help="GB/s that the driver restores at; 0: as fast as it goes")
    add_flag(parser, 2048)
    bench = Bench(parser.parse_args())
    end_by_signal()
    print("simulated driver; medians of", bench.options.rounds, f"rounds; 'ours' is all but the time within the driver's calls; {told(bench.options.own_mib)}")
    for processes in (1, 8) if bench.options.only != "restores" else ():
        shares = bench.pauses(processes)
        print(f"{processes} process(es) of 16 MiB: ours of pause {shares['pause'] * 1000:.1f} ms, of wake {shares['wake'] * 1000:.1f} ms")
    if bench.options.only == "pauses":
        return
    bench.keep("device", "")
    bench.keep("direct", "", "--gpu-direct")
    bench.keep("host", "--host")
    moved = bench.options.mib * 2**20 / 1e9
    for rate in bench.options.rates:
        print(f"driver slowed to {rate} GB/s:" if rate else "driver as fast as it goes:")
        for name, what in (("device", "device memory"), ("direct", "device memory past the server's own")):
            # In pairs: all three at once may be more than is kept decoded, and what is decoded anew is no comparison.
            seen = bench.restores([name, "host"], rate)
            (ours, driver), (host, _) = seen[name], seen["host"]
            spent, pairs = statistics.median(driver), [one / other for one, other in zip(ours, host)]
            reached = f"{moved / spent:.2f} GB/s" if spent else "no call"
            print(f"  restore of {bench.options.mib} MiB of host memory: {spread(host)} s")
            print(f"  the same bytes of {what}: {spread(ours)} s and {spent:.3f} s in the driver ({reached})")
            ratio = statistics.median(ours) / statistics.median(host)
            print(f"  ours {ratio:.2f} times; pair by pair {spread(pairs, 2)}", flush=True)


def spread(values, digits=3):
    """The median, and from least to most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


main()
