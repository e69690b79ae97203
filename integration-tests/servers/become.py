"""A server that becomes another program while its memory is still being filled.

    --mib N                private memory, every byte known; a child that stays has it too, copied on write
    POST /start            a second child with the same memory becomes another program; what that holds is part of `/check` later
    POST /become           the server itself becomes another program, with other memory; the children go on
    POST /become?alone=1   the same, after the children were killed
    GET  /program          which program this is: 1, or 2 once it has become another one
"""

import os
import signal
import socket
import sys
import threading
import time

from memory import Child, Memory
from serving import Checks, arguments, block, digest, expect, serve

# What the program that a child becomes holds, and what the server holds as another program.
CHILD_MIB = 4
SECOND_MIB = 16
# The answer to `/become` is on its way before the program that gave it ends.
ANSWER_SECONDS = 0.2


def execute(*flags):
    """Becomes this file, started anew with `flags`."""
    os.execv(sys.executable, [sys.executable, "-B", __file__, *map(str, flags)])


def content(mib):
    """Memory of a new program, made and then read again."""
    made = [bytearray(block("new", number)) for number in range(mib)]
    return digest(b"".join(made))


class Beginner:
    """A child that becomes another program when it is asked to, whatever of its memory has arrived."""

    def __init__(self):
        self.connection, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            theirs.recv(1)
            theirs.set_inheritable(True)
            execute("--answer", theirs.fileno())
        theirs.close()

    def start(self):
        self.connection.send(b"!")


class StayingChild:
    """The child of the first program that stays, as the second program knows it."""

    def __init__(self, descriptor):
        self.connection = socket.socket(fileno=descriptor)

    check = Child.check


class BegunChild:
    """The child of the first program that became another one, as the second program knows it."""

    def __init__(self, descriptor):
        self.connection = socket.socket(fileno=descriptor)
        self.held = None

    def check(self):
        if self.held is None:
            self.held = self.connection.recv(64).decode()
        expect("content of the child's new program", self.held, content(CHILD_MIB))


def first(options):
    memory = Memory("random", 1)
    memory.grow(options.mib)
    staying = Child(memory)
    beginner = Beginner()
    checks = Checks()
    checks.add("memory", memory.check)
    checks.add("child", staying.check)

    def start(query, body):
        beginner.start()
        return 200, {"started": True}

    def become(query, body):
        flags = ["--port", options.port, "--second"]
        if "alone" in query:
            for child in (staying, beginner):
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
        else:
            for name, child in (("--staying", staying), ("--begun", beginner)):
                child.connection.set_inheritable(True)
                flags += [name, child.connection.fileno()]

        def later():
            time.sleep(ANSWER_SECONDS)
            execute(*flags)

        threading.Thread(target=later).start()
        return 200, {"becoming": 2}

    program = {("GET", "/program"): lambda query, body: (200, {"program": 1})}
    serve(options, checks, {**program, ("POST", "/start"): start, ("POST", "/become"): become})


def second(options):
    memory = Memory("random", 1)
    memory.grow(SECOND_MIB)
    checks = Checks()
    checks.add("memory", memory.check)
    if options.staying is not None:
        checks.add("child", StayingChild(options.staying).check)
        checks.add("begun", BegunChild(options.begun).check)
    serve(options, checks, {("GET", "/program"): lambda query, body: (200, {"program": 2})})


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--second", action="store_true", help="this is the program that the server became")
    parser.add_argument("--staying", type=int, metavar="FD", help="connection to the child that stays")
    parser.add_argument("--begun", type=int, metavar="FD", help="connection to the child that became another program")
    parser.add_argument("--answer", type=int, metavar="FD", help="only tell what new memory holds")
    options = parser.parse_args()
    if options.answer is not None:
        os.write(options.answer, content(CHILD_MIB).encode())
    elif options.second:
        second(options)
    else:
        first(options)


if __name__ == "__main__":
    main()
