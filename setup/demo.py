"""The steps of setup/demo, and its table."""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import time
import tomllib
import urllib.request

RESTORES = 3
NAME = "embedding"
PORT = 8000
TOLERANCE = 1e-5
ANSWER_SECONDS_MAX = 60


class Failed(Exception):
    pass


class Rewarm:
    def __init__(self, program, state):
        self.command = [str(program), "--state", str(state), "--json"]

    def __call__(self, *arguments):
        """What the verb prints, and how many seconds it took."""
        began = time.monotonic()
        done = subprocess.run([*self.command, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - began
        if done.returncode != 0:
            raise Failed(f"rewarm {arguments[0]} ends with {done.returncode}: {done.stdout.strip()}")
        return json.loads(done.stdout), seconds


def find(value, key):
    """The first value under `key`, however deep."""
    if isinstance(value, dict):
        if key in value:
            return value[key]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            found = find(inner, key)
            if found is not None:
                return found
    return None


def ask(port, request):
    body = request.get("body_json")
    data = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{port}{request['path']}"
    call = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(call, timeout=ANSWER_SECONDS_MAX) as answer:
        return json.load(answer)


def equal(seen, expected):
    """As the probe compares: numbers with a fraction may differ a little, all else must be the same."""
    if isinstance(expected, float) and isinstance(seen, float):
        return math.isclose(seen, expected, rel_tol=0, abs_tol=TOLERANCE)
    if isinstance(expected, list) and isinstance(seen, list):
        return len(seen) == len(expected) and all(map(equal, seen, expected))
    if isinstance(expected, dict) and isinstance(seen, dict):
        return seen.keys() == expected.keys() and all(equal(seen[key], expected[key]) for key in expected)
    return type(seen) is type(expected) and seen == expected


def mib(count):
    return f"{count / (1 << 20):.0f} MiB"


def demo(options):
    rewarm = Rewarm(options.rewarm, options.state)
    probe = options.example / "probe.toml"
    requests = tomllib.loads(probe.read_text())["request"]
    # The first question of a user is not the health check.
    first = next(request for request in requests if "body_json" in request)
    reference = f"{options.store.rstrip('/')}/{NAME}"
    rows = []

    def note(text):
        print(f"demo: {text}", flush=True)

    def first_answer(began, output):
        port = find(output, "host_port")
        ask(port, first)
        return port, time.monotonic() - began

    note("starting the server cold")
    began = time.monotonic()
    output, ready = rewarm(
        *("run", NAME, "--port", PORT, "--publish", f"127.0.0.1:0:{PORT}", "--ready", f"http://127.0.0.1:{PORT}/healthz", "--"),
        *(options.python, options.example / "server.py", "--port", PORT),
    )
    port, cold = first_answer(began, output)
    rows.append(("cold start", f"ready {ready:.2f} s", f"first answer {cold:.2f} s", ""))
    expected = [ask(port, request) for request in requests]

    note(f"snapshot into {reference}, then the server is stopped")
    output, took = rewarm("snapshot", NAME, reference, "--stop", "--probe", probe)
    sizes = f"{mib(output['content_bytes'])} held, {mib(output['stored_bytes'])} stored"
    rows.append(("snapshot", f"took {took:.2f} s, frozen {output['frozen_ms'] / 1000:.2f} s", sizes, f"in {output['reference']}"))
    rewarm("rm", NAME)

    for number in range(1, RESTORES + 1):
        note(f"restore {number} of {RESTORES}")
        began = time.monotonic()
        output, ready = rewarm("restore", reference, "--publish", f"127.0.0.1:0:{PORT}")
        port, answer = first_answer(began, output)
        same = sum(equal(ask(port, request), value) for request, value in zip(requests, expected))
        sooner = f"{cold / answer:.1f} times sooner"
        equals = f"answers equal: {same} of {len(requests)}"
        rows.append((f"restore {number}", f"ready {ready:.2f} s", f"first answer {answer:.2f} s, {sooner}", equals))
        rewarm("stop", NAME)
        rewarm("rm", NAME)
        if same != len(requests):
            break

    stages = ", ".join(f"{stage['stage']} {stage['took_ms']:.0f} ms" for stage in output["stages"])
    print()
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"\nstages of the last restore: {stages}")
    if not rows[-1][3].endswith(f"{len(requests)} of {len(requests)}"):
        raise Failed("a restored server answers differently")


def main():
    parser = argparse.ArgumentParser()
    for name in ("rewarm", "state", "python", "example"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--store", required=True)
    try:
        demo(parser.parse_args())
    except Failed as error:
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
