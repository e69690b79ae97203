"""The server that setup/bench-memory measures where no model is needed: memory of one kind and nothing else.

    --mib N    of random content, 0 for a small process
    --kind     private, shared (anonymous) or shm (a file in /dev/shm)
    POST /     a checksum of all of it
"""

import argparse
import http.server
import mmap
import random
import zlib

MIB = 1 << 20


def memory(kind, size):
    if kind == "shm":
        with open("/dev/shm/memory", "w+b") as file:
            file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE if kind == "private" else mmap.MAP_SHARED)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mib", type=int, default=0)
    parser.add_argument("--kind", choices=("private", "shared", "shm"), default="private")
    options = parser.parse_args()
    content = memory(options.kind, options.mib * MIB) if options.mib else b""
    source = random.Random(options.kind)
    for at in range(0, options.mib * MIB, MIB):
        content[at : at + MIB] = source.randbytes(MIB)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            # What is left unread would break the connection when it is closed.
            self.rfile.read(int(self.headers.get("content-length", 0)))
            text = b"ready" if self.path == "/healthz" else b'"%08x"' % zlib.crc32(content)
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, format, *values):
            pass

    http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
