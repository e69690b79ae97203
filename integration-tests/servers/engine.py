"""Plays the HTTP interface of an inference engine, as its documentation has it: the paths that its preset calls, and the order in
which they may be called. There is no model and no device in it, and nothing of the engine's own code.

    GET  /healthz   ready
    GET  /check     whether it serves: neither paused nor without some of its memory
    GET  /steps     what it was asked for, in order, without the two above, and what it has in work

A generation with {"seconds": N} takes so long.
"""

import argparse
import http.server
import json
import threading
import time
import urllib.parse

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, required=True)
arguments.add_argument("--engine", choices=["vllm", "sglang", "llamacpp"], required=True)
arguments = arguments.parse_args()

changed = threading.Condition()
steps, running, paused, aborted, away = [], 0, False, 0, set()
MEMORY = {"weights", "kv_cache"}


def generate(body):
    global running
    with changed:
        if paused or away:
            return 503, f"paused: {paused}, away: {sorted(away)}"
        running += 1
        before = aborted
        changed.notify_all()
        ended = changed.wait_for(lambda: aborted > before, body.get("seconds", 0))
        running -= 1
        changed.notify_all()
    return (500, "aborted") if ended else (200, "Hello")


def pause(mode):
    global paused, aborted
    with changed:
        if mode not in ("abort", "wait"):
            return 400, f"mode {mode!r}"
        paused = True
        if mode == "abort":
            aborted += 1
            changed.notify_all()
        changed.wait_for(lambda: running == 0)
    return 200, "paused"


def go_on():
    global paused
    if away:
        return 409, f"away: {sorted(away)}"
    paused = False
    return 200, "resumed"


def give_up(tags):
    if not paused or running:
        return 500, f"paused: {paused}, running: {running}"
    away.update(tags)
    return 200, "asleep"


def take_back(tags):
    if not tags <= away:
        return 400, f"{sorted(tags)} of {sorted(away)}"
    away.difference_update(tags)
    return 200, "awake"


def one(query, name, default):
    return query.get(name, [default])[0]


PATHS = {
    "vllm": {
        "POST /pause": lambda query, body: pause(one(query, "mode", "abort")),
        "POST /sleep": lambda query, body: give_up(MEMORY if one(query, "level", "1") == "1" else set()),
        "POST /wake_up": lambda query, body: take_back(set(query.get("tags", MEMORY))),
        "POST /resume": lambda query, body: go_on(),
        "GET /health": lambda query, body: (200, ""),
        "POST /v1/completions": lambda query, body: generate(body),
    },
    "sglang": {
        "POST /pause_generation": lambda query, body: pause(body.get("mode", "abort")),
        "POST /release_memory_occupation": lambda query, body: give_up(set(body.get("tags", MEMORY))),
        "POST /resume_memory_occupation": lambda query, body: take_back(set(body.get("tags", MEMORY))),
        "POST /continue_generation": lambda query, body: go_on(),
        "GET /health": lambda query, body: (200, ""),
        "POST /generate": lambda query, body: generate(body),
    },
    "llamacpp": {
        "GET /health": lambda query, body: (200, ""),
        "POST /completion": lambda query, body: generate(body),
    },
}[arguments.engine]


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def asked(self):
        url = urllib.parse.urlsplit(self.path)
        name = f"{self.command} {url.path}"
        if name == "GET /healthz":
            return 200, ""
        if name == "GET /check":
            return (500 if paused or away else 200), {"paused": paused, "away": sorted(away)}
        if name == "GET /steps":
            return 200, {"steps": steps, "running": running}
        steps.append(name)
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        if name not in PATHS:
            return 404, name
        return PATHS[name](urllib.parse.parse_qs(url.query), body)

    def do_GET(self):
        self.answer(*self.asked())

    do_POST = do_GET

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("0.0.0.0", arguments.port), Handler).serve_forever()
