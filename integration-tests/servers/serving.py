"""HTTP for the fixture servers: `/healthz`, and `/check` that looks at everything a server holds.

`/check` answers 200 with `{"ok": true, "parts": {"pipe": "ok", ...}, "seen": {...}}`, or 500 when a part is not as its
server made it. `parts` is the same each time; `seen` holds what grows or moves, such as counters.
"""

import argparse
import hashlib
import http.server
import json
import os
import random
import signal
import threading
import time
import traceback
import urllib.parse

BLOCK = 1 << 20


class Broken(Exception):
    """Something is not as it was made. The text says what was seen and what was expected."""


def expect(what, seen, expected):
    if seen != expected:
        raise Broken(f"{what} is {seen!r}, expected {expected!r}")


def wait_until(what, condition, seconds=5.0):
    """Waits for what a timer or another process should bring about."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Broken(f"{what} did not come within {seconds} s")
        time.sleep(0.005)


def block(seed, index):
    """The `index`-th MiB of a pattern that does not compress; the same everywhere."""
    return random.Random(f"{seed}-{index}").randbytes(BLOCK)


def fill(memory, seed, offset=0):
    """Writes the pattern into something that takes slices. The size must be a multiple of a MiB."""
    for index in range((len(memory) - offset) // BLOCK):
        at = offset + index * BLOCK
        memory[at : at + BLOCK] = block(seed, index)


def digest(memory):
    return hashlib.sha256(memory).hexdigest()


class Checks:
    """Named checks. Each returns what it saw (or nothing) and raises when something is broken."""

    def __init__(self):
        self.checks = {}

    def add(self, name, function):
        self.checks[name] = function

    def run(self):
        parts, seen = {}, {}
        for name, function in self.checks.items():
            try:
                found = function()
                parts[name] = "ok"
                if found is not None:
                    seen[name] = found
            except Exception as error:
                parts[name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
        ok = all(part == "ok" for part in parts.values())
        return (200 if ok else 500), {"ok": ok, "parts": parts, "seen": seen}


def arguments(description, **options):
    """A parser with what every fixture takes."""
    parser = argparse.ArgumentParser(description=description, **options)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser


class Server(http.server.ThreadingHTTPServer):
    # A check may be asked many times at once, after many restores.
    request_queue_size = 128
    daemon_threads = True


def serve(options, checks, routes=None, about=None):
    """Answers until the process ends. `routes`: (method, path) -> function(query, body) -> (status, JSON value). `about` is said in each answer."""
    # Two checks at once would steal each other's answers from pipes.
    one_at_a_time = threading.Lock()
    answers = {
        ("GET", "/healthz"): lambda query, body: (200, {"ready": True}),
        ("GET", "/check"): lambda query, body: checks.run(),
        **(routes or {}),
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            function = answers.get((self.command, url.path))
            if function is None:
                status, value = 404, {"error": f"no {self.command} {url.path}"}
            else:
                with one_at_a_time:
                    status, value = function(query, body)
            text = json.dumps({**about, **value} if about else value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, format, *values):
            pass

    # The first process of a namespace is not ended by a signal that it does not handle.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    server = Server((options.host, options.port), Handler)
    print(f"listening on {options.host}:{options.port}", flush=True)
    server.serve_forever()
