"""A server that asks a helper process of its own over a TCP connection on the loopback, which stays open.

A restore must bring both ends back, with what either side has counted and with bytes that are on their way.
"""

import json
import os
import socket

from serving import Checks, arguments, expect, serve


def run_helper(connection):
    served = 0
    reader, writer = connection.makefile("rb"), connection.makefile("wb")
    for line in reader:
        served += 1
        question = json.loads(line)
        reply = {"number": question["number"], "served": served, "square": question["value"] ** 2, "pid": os.getpid()}
        writer.write(json.dumps(reply).encode() + b"\n")
        writer.flush()


class Helper:
    def __init__(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.pid = os.fork()
        if self.pid == 0:
            connection = socket.create_connection(listener.getsockname())
            listener.close()
            try:
                run_helper(connection)
            except ConnectionError:
                pass  # The server is gone.
            os._exit(0)
        self.connection, _ = listener.accept()
        listener.close()
        self.ends = self.connection.getsockname(), self.connection.getpeername()
        self.reader, self.writer = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.asked = 0

    def send(self, value):
        self.asked += 1
        self.writer.write(json.dumps({"number": self.asked, "value": value}).encode() + b"\n")
        self.writer.flush()

    def receive(self, number):
        reply = json.loads(self.reader.readline() or b"null")
        expect("number of the answer", reply and reply["number"], number)
        expect("requests that the helper served", reply["served"], number)
        expect("pid of the helper", reply["pid"], self.pid)
        return reply

    def ask(self, value):
        self.send(value)
        return self.receive(self.asked)


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    helper = Helper()
    # One answer always waits in the socket: a restore must bring queued bytes back too.
    helper.send(3)

    def check():
        expect("square of three", helper.receive(helper.asked)["square"], 9)
        ends = helper.connection.getsockname(), helper.connection.getpeername()
        expect("ends of the connection", ends, helper.ends)
        helper.send(3)
        return helper.asked

    def square(query, body):
        helper.receive(helper.asked)
        reply = helper.ask(int(query["value"]))
        helper.send(3)
        return 200, {"square": reply["square"]}

    checks = Checks()
    checks.add("helper", check)
    serve(options, checks, {("GET", "/square"): square})


if __name__ == "__main__":
    main()
