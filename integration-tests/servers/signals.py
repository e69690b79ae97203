"""A server that counts what a process can see of having been stopped: it and a child of it handle SIGCONT, it handles SIGCHLD.

    --mib N                 private memory
    --shared-mib N          shared memory
    GET  /signals           {"server": {...}, "child": {...}}, how often each signal came, what waits, and what `wait` tells
    POST /continue          sends both of them a SIGCONT, and says what was seen then
"""

import mmap
import os
import signal
import threading

from serving import BLOCK, Checks, arguments, digest, expect, fill, serve, wait_until

THREADS = 4


class Counts:
    """How often signals came."""

    def __init__(self, *signals):
        self.counts = dict.fromkeys((number.name for number in signals), 0)
        for number in signals:
            signal.signal(number, self.count)

    def count(self, number, frame):
        self.counts[signal.Signals(number).name] += 1

    def seen(self):
        return {**self.counts, "waits": sorted(number.name for number in signal.sigpending())}


class Child:
    """A forked child that tells what it has seen."""

    def __init__(self):
        asked, self.ask = os.pipe()
        self.answered, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.ask)
            counts = Counts(signal.SIGCONT)
            while os.read(asked, 1):
                os.write(answer, bytes([counts.counts["SIGCONT"]]))
            os._exit(0)

    def seen(self):
        os.write(self.ask, b"?")
        return {"SIGCONT": os.read(self.answered, 1)[0]}


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=8)
    parser.add_argument("--shared-mib", type=int, default=0)
    options = parser.parse_args()

    held = {"private": mmap.mmap(-1, options.mib * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)}
    if options.shared_mib:
        held["shared"] = mmap.mmap(-1, options.shared_mib * BLOCK)
    checks = Checks()
    for name, memory in held.items():
        fill(memory, name)
        checks.add(name, lambda name=name, memory=memory, made=digest(memory): expect(f"digest of {name}", digest(memory), made))
    child = Child()
    counts = Counts(signal.SIGCONT, signal.SIGCHLD)
    for number in range(THREADS):
        threading.Thread(target=threading.Event().wait, daemon=True, name=f"idle-{number}").start()

    def seen():
        told = os.waitpid(child.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        return {"server": counts.seen(), "child": child.seen(), "wait": told[1] if told[0] else None}

    def go_on(query, body):
        os.kill(os.getpid(), signal.SIGCONT)
        os.kill(child.pid, signal.SIGCONT)
        wait_until("both handlers", lambda: counts.counts["SIGCONT"] and child.seen()["SIGCONT"])
        return 200, seen()

    serve(options, checks, {("GET", "/signals"): lambda query, body: (200, seen()), ("POST", "/continue"): go_on})


if __name__ == "__main__":
    main()
