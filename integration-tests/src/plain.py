"""The smallest server that tests can look into: one thread, memory with a pattern, a token that no other process has.

    GET  /healthz          ready
    GET  /check            digest of its memory, computed anew, and the token; 500 where the digest is not the first one
    GET  /count            how often it was asked for this, from 1
    GET  /environment      its environment variables
    POST /noise            overwrites the memory, so that /check differs from a snapshot's

SIGTERM ends it with status 7: it is process 1 of its container, for which the kernel drops signals without a handler.
"""

import hashlib
import http.server
import json
import os
import signal
import sys

memory = bytearray(hashlib.shake_256(b"plain").digest(4 << 20))
digest = hashlib.sha256(memory).hexdigest()
token = os.urandom(8).hex()
count = 0


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        global count
        if self.path == "/healthz":
            self.answer(200, {"ready": True})
        elif self.path == "/check":
            now = hashlib.sha256(memory).hexdigest()
            self.answer(200 if now == digest else 500, {"digest": now, "token": token})
        elif self.path == "/count":
            count += 1
            self.answer(200, {"count": count})
        elif self.path == "/environment":
            self.answer(200, dict(os.environ))
        else:
            self.answer(404, {"path": self.path})

    def do_POST(self):
        global digest
        memory[:4096] = os.urandom(4096)
        digest = hashlib.sha256(memory).hexdigest()
        self.answer(200, {"digest": digest})

    def log_message(self, format, *arguments):
        print(f"asked {self.path}", flush=True)


def end(*_):
    print("ending", flush=True)
    os._exit(7)


signal.signal(signal.SIGTERM, end)
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print("listening", flush=True)
print("a line on stderr", file=sys.stderr, flush=True)
server.serve_forever()
