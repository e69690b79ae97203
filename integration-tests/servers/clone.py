"""A server that shows what clones share, and renews it where a hook tells it to.

    GET  /random      the next number of Python's generator, which every clone inherits in the same state
    GET  /identity    what stands in /run/rewarm/identity.json
    GET  /identities  with --watch-identity, every uuid or error that was seen there, in order
    POST /reseed      the post hook: seeds the generator from the identity
    POST /drain       the pre hook
    GET  /hooks       how often each hook was called
    POST /exit?status=N

Hooks misbehave when told so: --drain-status N, --drain-seconds S, --reseed-status N, --reseed-seconds S. The server itself does
with --ready-seconds S (not ready before), --never-ready, and --exit-seconds S.
"""

import json
import os
import pathlib
import random
import threading
import time

from serving import Checks, arguments, serve

IDENTITY = pathlib.Path("/run/rewarm/identity.json")


def main():
    parser = arguments(__doc__.splitlines()[0])
    for hook in ("drain", "reseed"):
        parser.add_argument(f"--{hook}-status", type=int, default=200)
        parser.add_argument(f"--{hook}-seconds", type=float, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ready-seconds", type=float, default=0)
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--exit-seconds", type=float)
    parser.add_argument("--exit-status", type=int, default=7)
    parser.add_argument("--watch-identity", action="store_true")
    options = parser.parse_args()

    random.seed(options.seed)
    called = {"drain": 0, "reseed": 0}
    began = time.monotonic()

    def leave(seconds, status):
        def end():
            print(f"leaving with status {status}", flush=True)
            os._exit(status)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()

    def identity():
        return json.loads(IDENTITY.read_text())

    identities = []

    def watch():
        while True:
            try:
                seen = identity()["uuid"]
            except Exception as error:
                seen = f"{type(error).__name__}: {error}"
            if identities[-1:] != [seen]:
                identities.append(seen)

    if options.watch_identity:
        threading.Thread(target=watch, daemon=True).start()

    def drain(query, body):
        called["drain"] += 1
        time.sleep(options.drain_seconds)
        return options.drain_status, {"drained": True}

    def reseed(query, body):
        called["reseed"] += 1
        time.sleep(options.reseed_seconds)
        if options.reseed_status == 200 and IDENTITY.exists():
            random.seed(identity()["uuid"])
        return options.reseed_status, {"reseeded": True}

    def healthz(query, body):
        ready = not options.never_ready and time.monotonic() - began >= options.ready_seconds
        return (200 if ready else 503), {"ready": ready}

    def end(query, body):
        leave(0.05, int(query.get("status", 0)))
        return 200, {"leaving": True}

    checks = Checks()
    checks.add("alive", lambda: dict(called))
    if options.exit_seconds is not None:
        leave(options.exit_seconds, options.exit_status)
    serve(
        options,
        checks,
        {
            ("GET", "/healthz"): healthz,
            ("GET", "/random"): lambda query, body: (200, {"number": random.random()}),
            ("GET", "/identity"): lambda query, body: (200, identity()),
            ("GET", "/identities"): lambda query, body: (200, {"seen": identities}),
            ("GET", "/hooks"): lambda query, body: (200, called),
            ("POST", "/drain"): drain,
            ("POST", "/reseed"): reseed,
            ("POST", "/exit"): end,
        },
    )


if __name__ == "__main__":
    main()
