"""What the measurements do before each of their steps, so that none pays for what another one left."""

import mmap
import time


def settle(seconds, mib):
    """Waits, and makes so much free memory this machine's own; 0 takes it as it comes.

    The host of a virtual machine takes free memory back, in blocks of at least a huge page, and gives it again at a fraction of the
    speed (free page reporting). Which step meets such memory is chance, and nothing of what is measured. What is touched and let go is the
    machine's for a moment: half a second and more where this was tried."""
    time.sleep(seconds)
    if mib == 0:
        return
    with mmap.mmap(-1, mib << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        for page in range(0, len(area), mmap.PAGESIZE):
            area[page] = 1


def told(mib):
    """That in words, for the head of a table."""
    return f"before each step {mib} MiB of free memory are made the machine's own" if mib else "free memory as it comes"


def add_flag(parser, mib):
    """The flag of how much that is."""
    parser.add_argument(
        "--own-mib", type=int, default=mib, metavar="MIB",
        help="free memory that is made the machine's own before each step; 0: as the host of a virtual machine gives it",
    )
