"""A server that holds a file which was deleted while open: only the kernel, and so only a snapshot, still has it.

    --mib N      its size; --sparse makes it a hole of that size with a MiB at each end
    --dir DIR    where it was
    --mapped     keeps no descriptor of it, only a mapping
"""

import ctypes
import hashlib
import mmap
import os
import pathlib

from serving import BLOCK, Checks, arguments, block, expect, serve


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=8)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("/tmp"))
    parser.add_argument("--mapped", action="store_true")
    options = parser.parse_args()

    path = options.dir / "ghost"
    file = open(path, "w+b", buffering=0)
    size = options.mib * BLOCK
    file.truncate(size)
    written = sorted({0, options.mib - 1}) if options.sparse else range(options.mib)
    for index in written:
        os.pwrite(file.fileno(), block("ghost", index), index * BLOCK)
    # Somewhere in the middle: the position is the descriptor's own and has to come back.
    position = file.seek(size // 2)
    os.unlink(path)

    if options.mapped:
        # The module `mmap` keeps a descriptor of what it maps.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        at = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file.fileno(), 0)
        expect("mapped", at != ctypes.c_void_p(-1).value, True)
        file.close()

    def read(index):
        if options.mapped:
            return ctypes.string_at(at + index * BLOCK, BLOCK)
        return os.pread(file.fileno(), BLOCK, index * BLOCK)

    def digest():
        total = hashlib.sha256()
        for index in written:
            total.update(read(index))
        return total.hexdigest()

    expected = digest()

    def check():
        if options.mapped:
            expect("digest", digest(), expected)
            return
        status = os.fstat(file.fileno())
        expect("links to the file", status.st_nlink, 0)
        expect("size", status.st_size, size)
        expect("position", file.tell(), position)
        expect("digest", digest(), expected)

    checks = Checks()
    checks.add("ghost", check)
    serve(options, checks)


if __name__ == "__main__":
    main()
