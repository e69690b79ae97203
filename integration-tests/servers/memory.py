"""A server that holds memory with a known pattern, and can change it in every way while it runs.

    --mib N                 private memory, every byte known
    --content random|text|zero|gaps
                            gaps: random, and every third page is there and zero
    --shared                the memory is shared, not private
    --shared-by memfd|system_v
                            it is a memfd's, or a System V segment
    --read-only             nobody may write it any more
    --sparse N              only every N-th page is ever touched
    --fork                  a child has the same memory, copied on write, with some pages of its own
    --churn KIND,...        threads that go on all the time: mprotect, mremap, madvise, mmap, heap
    GET  /touch?pages=N     reads N pages, spread evenly
    POST /write?pages=N     changes N pages and keeps account of it
    POST /grow?mib=N        N MiB more
    GET  /digest            of all memory, for comparison between replicas
"""

import ctypes
import hashlib
import mmap
import os
import socket
import threading
import time

import calls
from serving import BLOCK, Broken, Checks, arguments, block, digest, expect, serve, wait_until

PAGE = 4096
CHURN_PAGES = 64
CHURN_SECONDS = 0.002
ZERO_PAGE = bytes(PAGE)


def of_memfd(size):
    descriptor = os.memfd_create("memory")
    os.ftruncate(descriptor, size)
    return memoryview(mmap.mmap(descriptor, size))


def of_system_v(size):
    # CRIU takes the number 0, which the first segment of a namespace has, for no segment and restores that one itself.
    calls.system_v_segment(PAGE)
    return calls.system_v_segment(size)


# How new memory is made.
NEW = {
    None: lambda size: calls.view(calls.anonymous(size), size),
    "anonymous": lambda size: memoryview(mmap.mmap(-1, size)),
    "memfd": of_memfd,
    "system_v": of_system_v,
}


class Memory:
    """Memory, and what must be in it."""

    def __init__(self, content, sparse, shared=None):
        self.content, self.sparse, self.shared = content, sparse, shared
        self.blocks = []
        self.digests = []
        self.generation = 0

    def grow(self, mib):
        size = mib * BLOCK
        if not size:
            return
        whole = NEW[self.shared](size)
        for index in range(mib):
            piece = whole[index * BLOCK : (index + 1) * BLOCK]
            self.fill(piece, len(self.blocks))
            self.blocks.append(piece)
            self.digests.append(digest(self.touched(piece)))

    def fill(self, piece, index):
        if self.content == "zero":
            filling = bytes(BLOCK)
        elif self.content == "text":
            filling = b"".join(b"%08x block %06x of text that compresses.\n"[:48] % (line, index) for line in range(BLOCK // 40))[:BLOCK]
        else:
            filling = bytearray(block("memory", index))
        if self.content == "gaps":
            for page in range(0, BLOCK, 3 * PAGE):
                filling[page : page + PAGE] = ZERO_PAGE
        for page in range(0, BLOCK, self.sparse * PAGE):
            end = page + (BLOCK if self.sparse == 1 else PAGE)
            piece[page:end] = filling[page:end]
            if self.sparse == 1:
                break

    def protect(self):
        for piece in self.blocks:
            address = ctypes.addressof(ctypes.c_char.from_buffer(piece))
            calls.succeed(calls.libc.mprotect(address, BLOCK, calls.PROT_READ))

    def touched(self, piece):
        """What was ever written. To look at other pages would make them, and a check must not change what it looks at."""
        if self.sparse == 1:
            return piece
        return b"".join(piece[page : page + PAGE] for page in range(0, BLOCK, self.sparse * PAGE))

    def check(self):
        for index, piece in enumerate(self.blocks):
            expect(f"digest of MiB {index}", digest(self.touched(piece)), self.digests[index])

    def digest(self):
        total = hashlib.sha256()
        for piece in self.blocks:
            total.update(self.touched(piece))
        return total.hexdigest()

    def places(self, pages):
        """Which pages to touch: (block, offset), spread evenly over what was written."""
        each = BLOCK // PAGE // self.sparse
        have = len(self.blocks) * each
        for number in range(min(pages, have)):
            index, page = divmod(number * have // min(pages, have), each)
            yield index, page * self.sparse * PAGE

    def touch(self, pages):
        return sum(self.blocks[index][offset] for index, offset in self.places(pages))

    def write(self, pages):
        self.generation += 1
        changed = set()
        for index, offset in self.places(pages):
            self.blocks[index][offset : offset + 8] = self.generation.to_bytes(8, "little")
            changed.add(index)
        for index in changed:
            self.digests[index] = digest(self.touched(self.blocks[index]))
        return len(changed)


class Child:
    """A forked child that has its parent's memory and, unless it is shared, 16 pages that it wrote itself."""

    def __init__(self, memory):
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            if not memory.shared:
                memory.write(16)
            while theirs.recv(1):
                try:
                    memory.check()
                    theirs.send(b"+")
                except Broken as error:
                    print(f"child: {error}", flush=True)
                    theirs.send(b"-")
            os._exit(0)
        theirs.close()
        self.connection = ours

    def check(self):
        self.connection.send(b"?")
        expect("answer of the child", self.connection.recv(1), b"+")


class Churn:
    """A thread that changes its own memory all the time and looks after each step whether it is as it should be."""

    def __init__(self, kind):
        self.kind = kind
        self.steps = 0
        self.error = None
        self.size = CHURN_PAGES * PAGE
        self.pattern = block("churn", 0)[: self.size]
        self.address = calls.anonymous(self.size)
        ctypes.memmove(self.address, self.pattern, self.size)
        threading.Thread(target=self.run, daemon=True, name=f"churn-{kind}").start()

    def run(self):
        step = getattr(self, self.kind)
        try:
            while True:
                step()
                self.steps += 1
                time.sleep(CHURN_SECONDS)
        except Exception as error:
            self.error = f"step {self.steps}: {type(error).__name__}: {error}"

    def same(self, what, address, expected):
        seen = ctypes.string_at(address, len(expected))
        if seen != expected:
            page = next(at for at in range(0, len(expected), PAGE) if seen[at : at + PAGE] != expected[at : at + PAGE]) // PAGE
            raise Broken(f"{what}: page {page} differs")

    def mprotect(self):
        calls.succeed(calls.libc.mprotect(self.address, self.size, calls.PROT_READ))
        self.same("while it cannot be written", self.address, self.pattern)
        calls.succeed(calls.libc.mprotect(self.address, self.size, calls.PROT_READ | calls.PROT_WRITE))
        self.pattern = self.pattern[1:] + self.pattern[:1]
        ctypes.memmove(self.address, self.pattern, self.size)

    def mremap(self):
        elsewhere = calls.succeed(calls.libc.mremap(self.address, self.size, 4 * self.size, calls.MREMAP_MAYMOVE))
        self.same("after it grew", elsewhere, self.pattern)
        self.same("new pages", elsewhere + self.size, bytes(self.size))
        self.address = calls.succeed(calls.libc.mremap(elsewhere, 4 * self.size, self.size, calls.MREMAP_MAYMOVE))
        self.same("after it shrank", self.address, self.pattern)

    def madvise(self):
        half = self.size // 2
        calls.succeed(calls.libc.madvise(self.address, half, calls.MADV_DONTNEED))
        self.same("pages that were given away", self.address, bytes(half))
        self.same("pages that were kept", self.address + half, self.pattern[half:])
        ctypes.memmove(self.address, self.pattern, half)

    def mmap(self):
        address = calls.anonymous(self.size)
        self.same("new memory", address, bytes(self.size))
        ctypes.memmove(address, self.pattern, self.size)
        self.same("new memory after it was written", address, self.pattern)
        calls.succeed(calls.libc.munmap(address, self.size))

    def heap(self):
        pieces = [bytearray(self.pattern[: PAGE * (number % 7 + 1)]) for number in range(32)]
        for number, piece in enumerate(pieces):
            if piece != self.pattern[: PAGE * (number % 7 + 1)]:
                raise Broken(f"piece {number} of the heap differs")

    def check(self):
        before = self.steps
        wait_until("a step", lambda: self.steps > before or self.error)
        if self.error:
            raise Broken(self.error)
        return self.steps


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--content", choices=("random", "text", "zero", "gaps"), default="random")
    parser.add_argument("--sparse", type=int, default=1, metavar="N", help="a divisor of 256")
    parser.add_argument("--shared", action="store_const", const="anonymous", dest="shared_by")
    parser.add_argument("--shared-by", choices=[kind for kind in NEW if kind])
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("--churn", default="", metavar="KIND,...")
    options = parser.parse_args()

    memory = Memory(options.content, options.sparse, options.shared_by)
    memory.grow(options.mib)
    if options.read_only:
        memory.protect()
    checks = Checks()
    checks.add("memory", memory.check)
    if options.fork:
        checks.add("child", Child(memory).check)
    for kind in filter(None, options.churn.split(",")):
        checks.add(f"churn_{kind}", Churn(kind).check)

    def grow(query, body):
        memory.grow(int(query["mib"]))
        return 200, {"mib": len(memory.blocks)}

    serve(
        options,
        checks,
        {
            ("GET", "/touch"): lambda query, body: (200, {"sum": memory.touch(int(query["pages"]))}),
            ("POST", "/write"): lambda query, body: (200, {"blocks": memory.write(int(query["pages"]))}),
            ("POST", "/grow"): grow,
            ("GET", "/digest"): lambda query, body: (200, {"sha256": memory.digest(), "mib": len(memory.blocks)}),
        },
    )


if __name__ == "__main__":
    main()
