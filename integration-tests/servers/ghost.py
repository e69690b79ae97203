"""A server that holds a file which was deleted while open: only the kernel, and so only a snapshot, still has it.

    --mib N      its size; --sparse makes it a hole of that size with a MiB at each end
    --dir DIR    where it was
"""

import hashlib
import os
import pathlib

from serving import BLOCK, Checks, arguments, block, expect, serve


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=8)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("/tmp"))
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

    def digest():
        total = hashlib.sha256()
        for index in written:
            total.update(os.pread(file.fileno(), BLOCK, index * BLOCK))
        return total.hexdigest()

    expected = digest()

    def check():
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
