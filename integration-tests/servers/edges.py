"""A server whose memory is as awkward as memory can be, and that goes on using it in every way while it is filled.

Held from the start, and looked at by `/check`: a reservation of 16 GiB with a few pages in it, thousands of mappings,
a mapping that grows downwards, locked memory, a child that goes on when its parent has ended. Done anew by each `/check`:
a process is started, memory that nobody looked at before is moved, given up, unmapped, write-protected and inherited, the heap
grows, pages are given up (`MADV_FREE`), memory is locked, huge pages are asked for, a userfaultfd of its own is asked for,
which a replica does not get.
"""

import ctypes
import errno
import mmap
import os
import subprocess

import calls
from serving import BLOCK, Broken, Checks, arguments, block, expect, fill, serve

PAGE = 4096
PROT = calls.PROT_READ | calls.PROT_WRITE
PRIVATE = calls.MAP_PRIVATE | calls.MAP_ANONYMOUS
MAP_FIXED, MAP_NORESERVE, MAP_GROWSDOWN = 0x10, 0x4000, 0x100
FAR = 0x1000_0000_0000
MADV_FREE, MADV_HUGEPAGE = 8, 14
USER_MODE_ONLY = 1
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
        put(self.address, block("locked", 0))
        calls.succeed(calls.libc.mlock(self.address, BLOCK))

    def check(self):
        same("locked memory", self.address, block("locked", 0))
        expect("bytes that the kernel counts as locked", locked_bytes() >= BLOCK, True)


def locked_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmLck:"))


class Locking:
    """Memory that is locked, and so must be there at once, when it is asked for; and let go again."""

    def __init__(self):
        self.size = BLOCK
        self.address = calls.anonymous(self.size)
        put(self.address, block("locking", 0))

    def check(self):
        before = locked_bytes()
        calls.succeed(calls.libc.mlock(self.address, self.size))
        expect("bytes more that are locked", locked_bytes() - before, self.size)
        same("memory that was locked just now", self.address, block("locking", 0))
        calls.succeed(calls.libc.munlock(self.address, self.size))


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


class Changing:
    """MiBs that nobody has looked at since they were written; each `/check` takes the next one and changes it in every way."""

    QUARTER = BLOCK // 4

    def __init__(self, count):
        self.places = [calls.anonymous(BLOCK) for _ in range(count)]
        for number, address in enumerate(self.places):
            put(address, block("changing", number))
        self.taken = 0

    def content(self, quarter):
        """What was written into a quarter of the MiB that is looked at."""
        at = quarter * self.QUARTER
        return block("changing", self.taken)[at : at + self.QUARTER]

    def check(self):
        if self.taken == len(self.places):
            return
        start = self.places[self.taken]
        child, tell = self.fork(start)
        try:
            self.change(*(start + number * self.QUARTER for number in range(4)))
        finally:
            os.close(tell)
        expect("exit of a child that has what its parent had", os.waitpid(child, 0)[1], 0)
        self.taken += 1

    def fork(self, start):
        """A child that looks at this memory when its parent has changed it."""
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(tell)
            os.read(told, 1)
            os._exit(ctypes.string_at(start, BLOCK) != block("changing", self.taken))
        os.close(told)
        return child, tell

    def change(self, moved, given, cut, protected):
        quarter = self.QUARTER
        elsewhere = ctypes.c_void_p(calls.anonymous(quarter))
        moving = calls.MREMAP_MAYMOVE | calls.MREMAP_FIXED
        calls.succeed(calls.libc.mremap(moved, quarter, quarter, moving, elsewhere))
        calls.succeed(calls.libc.madvise(given, quarter, calls.MADV_DONTNEED))
        calls.succeed(calls.libc.munmap(cut, quarter // 2))
        calls.succeed(calls.libc.mprotect(protected, quarter, calls.PROT_READ))
        same("memory that was moved", elsewhere.value, self.content(0))
        same("memory that was given up", given, bytes(quarter))
        same("the half that was not unmapped", cut + quarter // 2, self.content(2)[quarter // 2 :])
        same("memory that may only be read", protected, self.content(3))
        calls.succeed(calls.libc.mprotect(protected, quarter, PROT))
        put(protected, self.content(0))
        same("memory that may be written again", protected, self.content(0))


def grow_heap():
    """Pages above the heap, next to what is being filled."""
    old = calls.succeed(calls.libc.sbrk(16 * PAGE))
    first = -(-old // PAGE) * PAGE
    same("new page of the heap", first, bytes(15 * PAGE))
    put(first, page(1))
    same("written page of the heap", first, page(1))


def own_userfaultfd():
    """A userfaultfd cannot be dumped, so nobody gets one; libraries go another way then, as on a kernel without."""
    for flags in (os.O_CLOEXEC, os.O_CLOEXEC | USER_MODE_ONLY):
        made = calls.libc.syscall(calls.SYS_USERFAULTFD, flags)
        error = None if made >= 0 else errno.errorcode[ctypes.get_errno()]
        expect("answer to userfaultfd", error, "ENOSYS")


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--mappings", type=int, default=1000)
    parser.add_argument("--mib", type=int, default=0, help="more memory, which is filled before the rest")
    options = parser.parse_args()
    checks = Checks()
    checks.add("orphan", Orphan().check)
    checks.add("reservation", Reservation().check)
    checks.add("mappings", Mappings(options.mappings).check)
    checks.add("downwards", Downwards().check)
    checks.add("locked", Locked().check)
    checks.add("locking", Locking().check)
    checks.add("execute", execute)
    checks.add("changing", Changing(16).check)
    checks.add("heap", grow_heap)
    checks.add("given_up", GivenUp().check)
    checks.add("huge", Huge().check)
    checks.add("own_userfaultfd", own_userfaultfd)
    # Last: the kernel puts it below all that was made before, and memory is filled from the lowest address.
    if options.mib:
        ballast = mmap.mmap(-1, options.mib * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        fill(ballast, "ballast")
    serve(options, checks)


if __name__ == "__main__":
    main()
