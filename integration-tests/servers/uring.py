"""A server that wants an io_uring and a userfaultfd, which CRIU cannot dump.

    --expect NAME|none    what the calls that make them must answer at start: an errno by name, or a descriptor
    POST /make?what=KIND  tries again, in the thread called `maker`: io_uring or userfaultfd
                          {"descriptor": ..., "error": ...}

    uring.py --allow PID  run outside, as root: lifts the seccomp filter from the maker thread of the server with that pid until
                          standard input ends. What is wanted is then made all the same, as it would be by a way nobody thought of.
                          (The kernel lets nobody pass a ring over a socket.)
"""

import ctypes
import errno
import os
import pathlib
import queue
import sys
import threading

import calls
from serving import Checks, arguments, expect, serve

ENTRIES = 8
# The kernel's struct io_uring_params is 120 bytes long; all zeros asks for nothing special.
PARAMETERS_BYTES = 120
USER_MODE_ONLY = 1
MAKER = "maker"


class Maker:
    """A thread that makes them, and what came of it."""

    CALLS = {
        "io_uring": lambda: calls.libc.syscall(calls.SYS_IO_URING_SETUP, ENTRIES, ctypes.create_string_buffer(PARAMETERS_BYTES)),
        # One that sees no faults of the kernel: others are root's.
        "userfaultfd": lambda: calls.libc.syscall(calls.SYS_USERFAULTFD, os.O_CLOEXEC | USER_MODE_ONLY),
    }

    def __init__(self):
        self.made = {}
        self.requests, self.replies = queue.Queue(), queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        calls.libc.prctl(calls.PR_SET_NAME, MAKER.encode(), 0, 0, 0)
        while True:
            descriptor = self.CALLS[self.requests.get()]()
            error = None if descriptor >= 0 else errno.errorcode[ctypes.get_errno()]
            self.replies.put((descriptor if descriptor >= 0 else None, error))

    def make(self, what):
        self.requests.put(what)
        descriptor, error = self.replies.get()
        if descriptor is not None:
            self.made[descriptor] = what
        return {"descriptor": descriptor, "error": error}


def allow(pid):
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().strip() == MAKER:
            break
    else:
        sys.exit(f"uring: process {pid} has no thread called {MAKER}")
    # Seizing does not stop the thread; the option lasts as long as we trace it.
    calls.succeed(calls.libc.ptrace(calls.PTRACE_SEIZE, int(task.name), None, calls.PTRACE_O_SUSPEND_SECCOMP))
    print("allowed", flush=True)
    sys.stdin.read()


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--expect", metavar="NAME")
    parser.add_argument("--allow", type=int, metavar="PID")
    options = parser.parse_args()
    if options.allow:
        allow(options.allow)
        return

    maker = Maker()
    at_start = {what: maker.make(what)["error"] or "none" for what in Maker.CALLS}

    def check():
        for what, answer in at_start.items():
            if options.expect:
                expect(f"answer to {what}", answer, options.expect)
        for descriptor, what in maker.made.items():
            expect("kind of the descriptor", os.readlink(f"/proc/self/fd/{descriptor}"), f"anon_inode:[{what}]")

    checks = Checks()
    checks.add("made", check)
    serve(options, checks, {("POST", "/make"): lambda query, body: (200, maker.make(query["what"]))})


if __name__ == "__main__":
    main()
