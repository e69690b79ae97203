"""A server that does what a test tells it: runs the code that it is sent, and answers with the value.

Listens on a port of its own choice, which it writes into the file that it is given.
"""

import os
import socket
import sys


def answer(code, names):
    try:
        try:
            return repr(eval(compile(code, "test", "eval"), names))
        except SyntaxError:
            exec(compile(code, "test", "exec"), names)
            return "None"
    except BaseException as error:
        return f"failed: {error!r}"


def main(port_file):
    names = {"__name__": "workload"}
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    with open(port_file + ".new", "w") as file:
        file.write(str(listener.getsockname()[1]))
    os.rename(port_file + ".new", port_file)
    while True:
        connection, _ = listener.accept()
        with connection:
            code = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
            connection.sendall(answer(code, names).encode())
            # A process that the code forked has the connection open as well.
            connection.shutdown(socket.SHUT_RDWR)


main(sys.argv[1])
