"""A server with a connection to the outside, and one inside for comparison.

    --connect HOST:PORT    where the connection goes; the other end need not say anything
    GET /connection        {"state": "open"} or {"state": "closed", "reason": ...}

`/check` looks at the connection inside, which must survive, and only reports the one to the outside.
"""

import select
import socket

from serving import Checks, arguments, expect, serve


def state_of(connection):
    """Whether the other end is still there, without waiting."""
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        if readable and not connection.recv(1, socket.MSG_PEEK):
            return {"state": "closed", "reason": "end of stream"}
        connection.getpeername()
    except OSError as error:
        return {"state": "closed", "reason": error.strerror}
    return {"state": "open"}


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--connect", required=True, metavar="HOST:PORT")
    options = parser.parse_args()
    host, port = options.connect.rsplit(":", 1)
    outside = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
    outside.settimeout(None)

    listener = socket.create_server(("127.0.0.1", 0))
    one = socket.create_connection(listener.getsockname())
    other, _ = listener.accept()
    listener.close()

    def inside():
        one.sendall(b"to and fro")
        expect("what came over the connection inside", other.recv(64), b"to and fro")
        other.sendall(b"and back")
        expect("what came back", one.recv(64), b"and back")

    def send(query, body):
        try:
            outside.sendall(body)
        except OSError as error:
            return 200, {"state": "closed", "reason": error.strerror}
        return 200, state_of(outside)

    checks = Checks()
    checks.add("inside", inside)
    checks.add("outside", lambda: state_of(outside))
    serve(
        options,
        checks,
        {("GET", "/connection"): lambda query, body: (200, state_of(outside)), ("POST", "/send"): send},
    )


if __name__ == "__main__":
    main()
