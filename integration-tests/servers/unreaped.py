"""A server with children that have ended and that it has not waited for: the kernel keeps their exit status, and nothing else."""

import os

from serving import Checks, arguments, expect, serve

CODES = (41, 0, 7)


def main():
    options = arguments(__doc__).parse_args()
    children = {}
    for code in CODES:
        child = os.fork()
        if child == 0:
            os._exit(code)
        children[child] = code

    def check():
        for child, code in children.items():
            # Looks, and leaves it there.
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            expect(f"exit status of {child}", ended.si_status, code)
            with open(f"/proc/{child}/stat") as stat:
                expect(f"state of {child}", stat.read().rsplit(")", 1)[1].split()[0], "Z")

    check()
    checks = Checks()
    checks.add("unreaped", check)
    serve(options, checks)


if __name__ == "__main__":
    main()
