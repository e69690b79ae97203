"""A server that got secrets the two usual ways: in its environment and in a file. Both end up in its memory.

    GET /environment    names and digests of the variables; never a value
"""

import hashlib
import os
import pathlib

from serving import Checks, arguments, expect, serve


def digests(values):
    return {name: hashlib.sha256(os.fsencode(value)).hexdigest() for name, value in values.items()}


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--file", type=pathlib.Path, metavar="PATH", help="read at start, kept in memory")
    options = parser.parse_args()

    secret = options.file.read_bytes() if options.file else None
    at_start = digests(os.environ)

    def check():
        expect("environment", digests(os.environ), at_start)
        if secret is not None:
            expect("bytes of the secret", len(secret) > 0, True)

    checks = Checks()
    checks.add("environment", check)
    serve(options, checks, {("GET", "/environment"): lambda query, body: (200, digests(os.environ))})


if __name__ == "__main__":
    main()
