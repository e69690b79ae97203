"""A server behind a gateway: one thread for each connection, and every kind of answer that a proxy can do wrong.

    GET  /healthz
    GET  /check             digest of its memory, computed anew
    GET  /who               its name in /run/rewarm/identity.json
    GET  /sleep?ms=N        answers after a while
    GET  /stream?n=N&ms=M   N server-sent events, M milliseconds apart
    GET  /headers           the head of the request, as it came
    POST /echo              length and digest of the body, with a trailer
    GET  /upgrade           leaves HTTP: whatever comes is sent back in capitals
    GET  /die               ends the process before it answers
    GET  /cut               ends the process in the middle of an answer
    GET  /hang              never answers
    GET  /status?code=N     answers with N
    GET  /metrics           what model servers say of themselves, under the name under which it began
    GET  /hooked            200 where a post hook has written down the name that it has now, else 500
    GET  /same              200 as long as it has the name under which it began, else 500

With --flaps a clone stops listening for five seconds before each answer to /check; a server that was started by its command does not.
With --unsure every other answer of /healthz is 503.
"""

import argparse
import hashlib
import json
import os
import socketserver
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlparse

MEMORY = bytearray(hashlib.shake_256(b"pool").digest(4 << 20))
DIGEST = hashlib.sha256(MEMORY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer goes out in one piece.
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if self.close_connection:
            self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def do_GET(self):
        url = urlparse(self.path)
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/healthz":
            self.server.asked += 1
            ready = not self.server.unsure or self.server.asked % 2 == 0
            self.answer(200 if ready else 503, {"ready": ready})
        elif url.path == "/check":
            digest = hashlib.sha256(MEMORY).hexdigest()
            if self.server.flaps and who() != BEGAN:
                self.server.shutdown()
                self.server.server_close()
                self.close_connection = True
            self.answer(200 if digest == DIGEST else 500, {"digest": digest})
        elif url.path == "/who":
            self.answer(200, who())
        elif url.path == "/sleep":
            time.sleep(int(asked["ms"]) / 1000)
            self.answer(200, who())
        elif url.path == "/stream":
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for number in range(int(asked["n"])):
                self.chunk(f"data: {number}\n\n".encode())
                time.sleep(int(asked["ms"]) / 1000)
            self.chunk(b"")
        elif url.path == "/headers":
            head = [[name.lower(), value] for name, value in self.headers.items()]
            self.answer(200, {"line": self.requestline, "headers": head})
        elif url.path == "/upgrade":
            self.send_response(101)
            self.send_header("connection", "upgrade")
            self.send_header("upgrade", self.headers["upgrade"])
            self.end_headers()
            self.wfile.flush()
            while data := self.connection.recv(4096):
                self.connection.sendall(data.upper())
            self.close_connection = True
        elif url.path == "/die":
            os._exit(3)
        elif url.path == "/cut":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            self.wfile.flush()
            os._exit(4)
        elif url.path == "/hang":
            time.sleep(3600)
        elif url.path == "/metrics":
            text = f'# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{worker_id="{BEGAN["name"]}"}} 1\n'
            self.send_response(200)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())
            self.wfile.flush()
        elif url.path == "/hooked":
            try:
                with open("/tmp/hooked") as file:
                    hooked = json.load(file)
            except OSError:
                hooked = None
            self.answer(200 if hooked == who() else 500, {"hooked": hooked})
        elif url.path == "/same":
            same = who() == BEGAN
            self.answer(200 if same else 500, {"same": same})
        elif url.path == "/status":
            self.answer(int(asked["code"]), {"code": int(asked["code"])})
        else:
            self.answer(404, {"path": self.path})

    def do_POST(self):
        digest, length = hashlib.sha256(), 0
        for data in self.body():
            digest.update(data)
            length += len(data)
        text = json.dumps({"bytes": length, "sha256": digest.hexdigest(), "name": who()["name"]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("trailer", "x-sum")
        self.end_headers()
        self.chunk(text)
        self.wfile.write(b"0\r\nx-sum: %s\r\n\r\n" % digest.hexdigest().encode())
        self.wfile.flush()

    def body(self):
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
        else:
            left = int(self.headers.get("content-length", "0"))
            while left:
                data = self.rfile.read(min(left, 1 << 20))
                if not data:
                    return
                left -= len(data)
                yield data


def who():
    with open("/run/rewarm/identity.json") as file:
        return json.load(file)


# What a snapshot holds of the replica that it was taken of.
BEGAN = who()


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--flaps", action="store_true")
    parser.add_argument("--unsure", action="store_true")
    options = parser.parse_args()
    while True:
        with Server(("127.0.0.1", options.port), Handler) as server:
            server.flaps, server.unsure, server.asked = options.flaps, options.unsure, 0
            server.serve_forever(poll_interval=0.05)
        time.sleep(5)


if __name__ == "__main__":
    main()
