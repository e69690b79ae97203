"""A server that wants io_uring, which CRIU cannot dump.

    --expect NAME|none    what io_uring_setup must answer at start: an errno by name, or a descriptor
    POST /make            tries again, in the thread called `maker`
    GET  /uring           {"descriptor": ..., "error": ...}

    uring.py --allow PID  run outside, as root: lifts the seccomp filter from the maker thread of the server with that pid until
                          standard input ends. A ring is then made all the same, as one would be by a way nobody thought of.
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
MAKER = "maker"


class Ring:
    def __init__(self):
        self.descriptor, self.error = None, None
        self.requests, self.replies = queue.Queue(), queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        calls.libc.prctl(calls.PR_SET_NAME, MAKER.encode(), 0, 0, 0)
        while True:
            self.requests.get()
            made = calls.libc.syscall(calls.SYS_IO_URING_SETUP, ENTRIES, ctypes.create_string_buffer(PARAMETERS_BYTES))
            if made >= 0:
                self.descriptor, self.error = made, None
            else:
                self.descriptor, self.error = None, errno.errorcode[ctypes.get_errno()]
            self.replies.put(None)

    def make(self):
        if self.descriptor is None:
            self.requests.put(None)
            self.replies.get()

    def state(self):
        return {"descriptor": self.descriptor, "error": self.error}


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

    ring = Ring()
    ring.make()
    at_start = ring.error or "none"

    def check():
        if options.expect:
            expect("answer of io_uring_setup", at_start, options.expect)
        if ring.descriptor is not None:
            expect("kind of the descriptor", os.readlink(f"/proc/self/fd/{ring.descriptor}"), "anon_inode:[io_uring]")

    def make(query, body):
        ring.make()
        return 200, ring.state()

    checks = Checks()
    checks.add("uring", check)
    serve(options, checks, {("GET", "/uring"): lambda query, body: (200, ring.state()), ("POST", "/make"): make})


if __name__ == "__main__":
    main()
