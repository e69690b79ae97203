"""A server whose memory is as awkward as memory can be, and that goes on using it in every way while it is filled.

Held from the start, and looked at by `/check`: a reservation of 16 GiB with a few pages in it, thousands of mappings,
a mapping that grows downwards, locked memory, a child that goes on when its parent has ended. Done anew by each `/check`:
a process is started, pages are given up (`MADV_FREE`), huge pages are asked for, a userfaultfd of its own is used.
"""

import ctypes
import fcntl
import mmap
import os
import subprocess
import struct
import threading

import calls
from serving import BLOCK, Broken, Checks, arguments, block, expect, serve

PAGE = 4096
PROT = calls.PROT_READ | calls.PROT_WRITE
PRIVATE = calls.MAP_PRIVATE | calls.MAP_ANONYMOUS
MAP_FIXED, MAP_NORESERVE, MAP_GROWSDOWN = 0x10, 0x4000, 0x100
FAR = 0x1000_0000_0000
MADV_FREE, MADV_HUGEPAGE = 8, 14
SYS_USERFAULTFD, USER_MODE_ONLY = 323, 1
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
GIB = 1 << 30


def page(number):
    """Content of a page, different for each."""
    return (b"%016x" % (number * 0x9E3779B97F4A7C15 % (1 << 64))) * (PAGE // 16)


def put(address, content):
    ctypes.memmove(address, content, len(content))


def same(what, address, content):
    if ctypes.string_at(address, len(content)) != content:
        raise Broken(f"{what} at {address:#x} differs")


class Reservation:
    """16 GiB of addresses, a page in each 64 MiB."""

    STEP = 64 << 20

    def __init__(self):
        self.size = 16 * GIB
        self.address = calls.succeed(calls.libc.mmap(None, self.size, PROT, PRIVATE | MAP_NORESERVE, -1, 0))
        for number, at in enumerate(range(0, self.size, self.STEP)):
            put(self.address + at, page(number))

    def check(self):
        for number, at in enumerate(range(0, self.size, self.STEP)):
            same("page of the reservation", self.address + at, page(number))
            same("page beside it", self.address + at + PAGE, bytes(PAGE))
        return 16


class Mappings:
    """Every second page read-only: the kernel keeps each as a mapping of its own."""

    def __init__(self, count):
        self.count = count
        self.address = calls.anonymous(count * PAGE)
        for number in range(0, count, 7):
            put(self.address + number * PAGE, page(number))
        for number in range(1, count, 2):
            calls.succeed(calls.libc.mprotect(self.address + number * PAGE, PAGE, calls.PROT_READ))

    def check(self):
        for number in range(self.count):
            same("page of the mappings", self.address + number * PAGE, bytes(PAGE) if number % 7 else page(number))
        return self.count


class Downwards:
    """A mapping that grows when the page below it is touched."""

    def __init__(self):
        # Far from everything: the kernel lets it grow only where a MiB below it is free.
        self.top = calls.succeed(calls.libc.mmap(FAR, PAGE, PROT, PRIVATE | MAP_GROWSDOWN | MAP_FIXED, -1, 0)) + PAGE
        self.pages = 1
        put(self.top - PAGE, page(0))

    def check(self):
        for number in range(self.pages):
            same("page that grew", self.top - (number + 1) * PAGE, page(number))
        if self.pages < 16:
            self.pages += 1
            put(self.top - self.pages * PAGE, page(self.pages - 1))
        return self.pages


class Locked:
    """Memory that must not be swapped, as keys are kept."""

    def __init__(self):
        self.address = calls.anonymous(BLOCK)
        calls.libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        put(self.address, block("locked", 0))
        self.locked = calls.libc.mlock(self.address, BLOCK) == 0

    def check(self):
        same("locked memory", self.address, block("locked", 0))
        return self.locked


class Orphan:
    """A grandchild with memory of its own: its parent ends as soon as it is asked to, whatever is being filled."""

    def __init__(self):
        self.content = [bytearray(block("orphan", number)) for number in range(8)]
        asked, self.ask = os.pipe()
        self.answered, answer = os.pipe()
        leave, self.leave = os.pipe()
        self.parent = os.fork()
        if self.parent == 0:
            # A pipe that nobody writes to any more must end.
            os.close(self.ask)
            if os.fork() == 0:
                self.live(asked, answer)
            os.close(self.leave)
            os.read(leave, 1)
            os._exit(0)
        self.left = False

    def live(self, asked, answer):
        os.close(self.leave)
        while os.read(asked, 1):
            good = all(content == block("orphan", number) for number, content in enumerate(self.content))
            os.write(answer, b"+" if good else b"-")
        os._exit(0)

    def check(self):
        if not self.left:
            self.left = True
            os.write(self.leave, b"x")
            os.waitpid(self.parent, 0)
        os.write(self.ask, b"?")
        expect("answer of the orphan", os.read(self.answered, 1), b"+")


def execute():
    """A process that is started while its parent's memory is being filled."""
    result = subprocess.run(["/bin/echo", "started"], capture_output=True, check=True)
    expect("output of a new process", result.stdout, b"started\n")


class GivenUp:
    """Pages that the kernel may take: each holds what was written, or zeros."""

    def __init__(self):
        self.address = calls.anonymous(64 * PAGE)

    def check(self):
        for number in range(64):
            put(self.address + number * PAGE, page(number))
        calls.succeed(calls.libc.madvise(self.address, 64 * PAGE, MADV_FREE))
        for number in range(64):
            seen = ctypes.string_at(self.address + number * PAGE, PAGE)
            if seen not in (page(number), bytes(PAGE)):
                raise Broken(f"page {number} that was given up is neither old nor empty")


class Huge:
    """Memory for which huge pages are asked after it was filled."""

    def __init__(self):
        self.size = 4 * BLOCK
        self.address = calls.anonymous(self.size)
        for number in range(4):
            put(self.address + number * BLOCK, block("huge", number))

    def check(self):
        calls.libc.madvise(self.address, self.size, MADV_HUGEPAGE)
        for number in range(4):
            same("memory in huge pages", self.address + number * BLOCK, block("huge", number))


def own_userfaultfd():
    """A page that another thread waits for is served by the server itself."""
    descriptor = calls.libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | USER_MODE_ONLY)
    if descriptor < 0:
        return False
    try:
        fcntl.ioctl(descriptor, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
        memory = mmap.mmap(-1, PAGE, flags=PRIVATE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(descriptor, UFFDIO_REGISTER, struct.pack("QQQQ", address, PAGE, 1, 0))
        seen = ctypes.create_string_buffer(b"x", 1)
        # By a call that lets other Python threads run while it waits.
        thread = threading.Thread(target=calls.libc.memcpy, args=(seen, ctypes.c_void_p(address), ctypes.c_size_t(1)))
        thread.start()
        message = os.read(descriptor, 32)
        expect("event of the own userfaultfd", message[0], 0x12)
        fcntl.ioctl(descriptor, UFFDIO_ZEROPAGE, struct.pack("QQQq", address, PAGE, 0, 0))
        thread.join(5)
        expect("what the waiting thread read", seen.raw, b"\0")
    finally:
        os.close(descriptor)
    return True


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--mappings", type=int, default=1000)
    options = parser.parse_args()
    checks = Checks()
    checks.add("orphan", Orphan().check)
    checks.add("reservation", Reservation().check)
    checks.add("mappings", Mappings(options.mappings).check)
    checks.add("downwards", Downwards().check)
    checks.add("locked", Locked().check)
    checks.add("execute", execute)
    checks.add("given_up", GivenUp().check)
    checks.add("huge", Huge().check)
    checks.add("own_userfaultfd", own_userfaultfd)
    serve(options, checks)


if __name__ == "__main__":
    main()
