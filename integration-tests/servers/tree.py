"""A tree of processes that holds one of nearly everything that a kernel gives a server.

    server --- pipe worker      answers over a pair of pipes
           |-- socket worker    answers over a Unix socket pair
           `-- session leader   in a session of its own; listens on a Unix socket with a name
                 `-- its child  answers over pipes to the session leader

All of them share anonymous memory. The server holds besides: a memfd, a file in /dev/shm, a System V segment, an eventfd,
epoll, threads, a periodic timerfd, an interval timer, a POSIX timer, and a file that it appends to all the time.
"""

import json
import mmap
import os
import pathlib
import queue
import select
import signal
import socket
import struct
import threading

import calls
from serving import Checks, arguments, digest, expect, fill, serve, wait_until

MIB = 1 << 20
THREADS = 4
# A path in overlay storage: the line that is being written when the tree is frozen must be there after a restore.
APPEND_SECONDS = 0.02


def answer_lines(read_from, write_to, shared):
    """A worker's life: one JSON line in, one out, with a count of its own; ends when its parent is gone."""
    served = 0
    for line in read_from:
        request = json.loads(line)
        served += 1
        reply = {"number": request["number"], "served": served, "pid": os.getpid(), "session": os.getsid(0)}
        if request.get("digest"):
            reply["digest"] = digest(shared)
        write_to.write(json.dumps(reply).encode() + b"\n")
        write_to.flush()


class Worker:
    """The server's end of a line to a worker."""

    def __init__(self, read_from, write_to, pid):
        self.read_from, self.write_to, self.pid = read_from, write_to, pid
        self.asked = 0

    def ask(self, **request):
        self.asked += 1
        self.write_to.write(json.dumps({"number": self.asked, **request}).encode() + b"\n")
        self.write_to.flush()
        return json.loads(self.read_from.readline())

    def check(self, shared_digest):
        reply = self.ask(digest=True)
        expect("number of the answer", reply["number"], self.asked)
        expect("requests that the worker served", reply["served"], self.asked)
        expect("pid of the worker", reply["pid"], self.pid)
        expect("digest of shared memory as the worker sees it", reply["digest"], shared_digest)
        return reply


def over_pipes(shared):
    request_end, request_start = os.pipe()
    reply_end, reply_start = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(request_start)
        os.close(reply_end)
        answer_lines(open(request_end, "rb"), open(reply_start, "wb"), shared)
        os._exit(0)
    os.close(request_end)
    os.close(reply_start)
    return Worker(open(reply_end, "rb"), open(request_start, "wb"), pid)


def over_socket_pair(shared):
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        answer_lines(theirs.makefile("rb"), theirs.makefile("wb"), shared)
        os._exit(0)
    theirs.close()
    return Worker(ours.makefile("rb"), ours.makefile("wb"), pid)


def in_own_session(shared, path):
    """A session leader behind a Unix socket with a name, that asks a child of its own before it answers."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        child = over_pipes(shared)
        connection, _ = listener.accept()
        read_from, write_to = connection.makefile("rb"), connection.makefile("wb")
        for line in read_from:
            reply = child.check(json.loads(line)["shared"])
            expect("session of the child", reply["session"], os.getpid())
            write_to.write(json.dumps({"served": reply["served"], "session": os.getsid(0)}).encode() + b"\n")
            write_to.flush()
        os._exit(0)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    listener.close()
    return Worker(connection.makefile("rb"), connection.makefile("wb"), pid)


class Ticks:
    """Counts what a timer brings about."""

    def __init__(self):
        self.count = 0

    def tick(self, *_):
        self.count += 1

    def check(self):
        before = self.count
        wait_until("a tick", lambda: self.count > before)
        return self.count


def read_timerfd(descriptor, ticks):
    while True:
        (expirations,) = struct.unpack("Q", os.read(descriptor, 8))
        ticks.count += expirations


class Appender:
    """Writes a numbered line every 20 ms into a file that stays open, and counts the lines in memory."""

    def __init__(self, path):
        self.path = path
        self.lines = 0
        self.lock = threading.Lock()
        self.file = open(path, "ab", buffering=0)
        self.file.truncate(0)
        threading.Thread(target=self.run, daemon=True, name="appender").start()

    def run(self):
        pause = threading.Event()
        while True:
            with self.lock:
                self.file.write(b"line %d\n" % self.lines)
                self.lines += 1
            pause.wait(APPEND_SECONDS)

    def check(self):
        before = self.lines
        wait_until("an appended line", lambda: self.lines > before)
        with self.lock:
            content = self.path.read_bytes()
            expect("end of the appended file", os.fstat(self.file.fileno()).st_size, len(content))
            expect("lines in the appended file", content, b"".join(b"line %d\n" % number for number in range(self.lines)))
            return self.lines


class Echo:
    """A thread that waits on a queue and answers on another."""

    def __init__(self, number):
        self.number = number
        self.asked = 0
        self.requests, self.replies = queue.Queue(), queue.Queue()
        threading.Thread(target=self.run, daemon=True, name=f"echo-{number}").start()

    def run(self):
        kept = threading.local()
        kept.served = 0
        while True:
            self.requests.get()
            kept.served += 1
            self.replies.put((self.number, kept.served))

    def check(self):
        self.asked += 1
        self.requests.put(None)
        expect("answer of the thread", self.replies.get(timeout=5), (self.number, self.asked))


def check_epoll(poller, pipe):
    """Something written into a watched pipe wakes the epoll, and nothing else does."""
    reader, writer = pipe
    expect("events before", poller.poll(0), [])
    os.write(writer, b"x")
    expect("events", poller.poll(1), [(reader, select.EPOLLIN)])
    expect("byte in the pipe", os.read(reader, 1), b"x")


def check_eventfd(descriptor, value):
    expect("value of the eventfd", os.eventfd_read(descriptor), value)
    os.eventfd_write(descriptor, value)


def check_process(folder):
    expect("working folder", os.getcwd(), str(folder))
    mask = os.umask(0o027)
    os.umask(mask)
    expect("umask", mask, 0o027)
    expect("blocked signals", signal.pthread_sigmask(signal.SIG_BLOCK, []) >= {signal.SIGUSR2}, True)
    expect("handler of SIGUSR1", signal.getsignal(signal.SIGUSR1), signal.SIG_IGN)


def hold_memory(checks, options):
    """Shared and named memory of every kind, each with a pattern."""
    memory_file = os.memfd_create("tree")
    os.ftruncate(memory_file, options.memfd_mib * MIB)
    path = pathlib.Path("/dev/shm/tree")
    with open(path, "w+b") as file:
        file.truncate(options.shm_mib * MIB)
        in_shm = mmap.mmap(file.fileno(), 0)
    held = {
        "memfd": mmap.mmap(memory_file, 0),
        "dev_shm": in_shm,
        "system_v": calls.system_v_segment(MIB),
        "private": mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    }
    for name, memory in held.items():
        fill(memory, name)

    def check(name, memory, expected):
        expect(f"digest of {name}", digest(memory), expected)

    for name, memory in held.items():
        checks.add(name, lambda name=name, memory=memory, expected=digest(memory): check(name, memory, expected))
    # The file by its name, besides the mapping.
    checks.add("dev_shm_file", lambda expected=digest(in_shm): check("file in /dev/shm", path.read_bytes(), expected))


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("/tmp/tree"))
    parser.add_argument("--shared-mib", type=int, default=64)
    parser.add_argument("--memfd-mib", type=int, default=16)
    parser.add_argument("--shm-mib", type=int, default=256)
    options = parser.parse_args()

    options.dir.mkdir(parents=True, exist_ok=True)
    os.chdir(options.dir)
    os.umask(0o027)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    checks = Checks()

    # Processes first: a fork after threads were started would copy their locks.
    shared = mmap.mmap(-1, options.shared_mib * MIB)
    fill(shared, "shared")
    shared_digest = digest(shared)
    workers = {"pipe_worker": over_pipes(shared), "socket_worker": over_socket_pair(shared)}
    leader = in_own_session(shared, options.dir / "leader.sock")

    def check_leader():
        reply = leader.ask(shared=shared_digest)
        expect("session of the leader", reply["session"], leader.pid)

    for name, worker in workers.items():
        checks.add(name, lambda worker=worker: worker.check(shared_digest)["served"])
    checks.add("session", check_leader)
    checks.add("shared", lambda: expect("digest of shared memory", digest(shared), shared_digest))
    hold_memory(checks, options)

    pipe = os.pipe()
    poller = select.epoll()
    poller.register(pipe[0], select.EPOLLIN)
    checks.add("epoll", lambda: check_epoll(poller, pipe))
    event = os.eventfd(77)
    checks.add("eventfd", lambda: check_eventfd(event, 77))
    checks.add("process", lambda: check_process(options.dir))
    for number in range(THREADS):
        checks.add(f"thread_{number}", Echo(number).check)

    timer, interval, posix = Ticks(), Ticks(), Ticks()
    # Shorter than any freeze: it expires while the tree is frozen.
    threading.Thread(target=read_timerfd, args=(calls.periodic_timerfd(10), timer), daemon=True, name="timerfd").start()
    signal.signal(signal.SIGALRM, interval.tick)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    signal.signal(signal.SIGRTMIN, posix.tick)
    calls.periodic_posix_timer(100, signal.SIGRTMIN)
    for name, ticks in (("timerfd", timer), ("interval_timer", interval), ("posix_timer", posix)):
        checks.add(name, ticks.check)
    checks.add("appended_file", Appender(options.dir / "appended").check)

    serve(options, checks)


if __name__ == "__main__":
    main()
