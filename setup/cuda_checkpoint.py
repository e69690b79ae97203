"""Stands in for NVIDIA's `cuda-checkpoint --toggle --pid N`, by the driver's own calls: suspends a process, or resumes it.

For the simulated driver, which has no such program. REWARM_LIBCUDA names the driver's library.
"""

import argparse
import ctypes
import os

CHECKPOINTED = 2


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toggle", action="store_true", required=True)
    parser.add_argument("--pid", type=int, required=True)
    pid = parser.parse_args().pid
    cuda = ctypes.CDLL(os.environ.get("REWARM_LIBCUDA", "libcuda.so.1"))

    def call(name, *arguments):
        result = getattr(cuda, name)(*arguments)
        if result != 0:
            raise SystemExit(f"cuda-checkpoint: {name} of {pid}: {result}")

    call("cuInit", 0)
    state = ctypes.c_uint()
    call("cuCheckpointProcessGetState", pid, ctypes.byref(state))
    steps = ("Restore", "Unlock") if state.value == CHECKPOINTED else ("Lock", "Checkpoint")
    for step in steps:
        # 64 bytes of zeros; a lock's first number is its timeout, and 0 waits for ever.
        arguments = (ctypes.c_uint * 16)(10_000 if step == "Lock" else 0)
        call(f"cuCheckpointProcess{step}", pid, arguments)


main()
