"""Linux calls that Python 3.11 has no function for."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.sbrk.restype = ctypes.c_void_p
libc.sbrk.argtypes = [ctypes.c_ssize_t]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
libc.syscall.restype = ctypes.c_long
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

PROT_READ, PROT_WRITE = 1, 2
MAP_PRIVATE, MAP_ANONYMOUS = 2, 32
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTNEED = 4
IPC_PRIVATE, IPC_CREAT = 0, 0o1000
CLOCK_MONOTONIC = 1
SYS_IO_URING_SETUP = 425
SYS_USERFAULTFD = 323
PR_SET_NAME = 15
PTRACE_SEIZE = 0x4206
PTRACE_O_SUSPEND_SECCOMP = 1 << 21
FAILED = ctypes.c_void_p(-1).value


def succeed(result):
    """Turns -1 into the exception that it stands for."""
    if result in (-1, FAILED):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class Itimerspec(ctypes.Structure):
    _fields_ = [("interval", Timespec), ("value", Timespec)]

    @classmethod
    def periodic(cls, milliseconds):
        time = Timespec(0, milliseconds * 1_000_000)
        return cls(time, time)


class Sigevent(ctypes.Structure):
    # The kernel's struct is 64 bytes long.
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    ]


def periodic_timerfd(milliseconds):
    """A file descriptor that becomes readable every so often, by the monotonic clock."""
    descriptor = succeed(libc.timerfd_create(CLOCK_MONOTONIC, 0))
    time = Itimerspec.periodic(milliseconds)
    succeed(libc.timerfd_settime(descriptor, 0, ctypes.byref(time), None))
    return descriptor


def periodic_posix_timer(milliseconds, signal):
    """Sends this process a signal every so often, by the monotonic clock. Lives as long as the process."""
    event = Sigevent(signal=signal, notify=0)
    timer = ctypes.c_void_p()
    succeed(libc.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)))
    time = Itimerspec.periodic(milliseconds)
    succeed(libc.timer_settime(timer, 0, ctypes.byref(time), None))


def anonymous(size):
    """Address of new private memory."""
    return succeed(libc.mmap(None, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))


def view(address, size):
    """Memory at an address, as something that takes slices."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def system_v_segment(size):
    """A view of a new System V shared memory segment."""
    segment = succeed(libc.shmget(IPC_PRIVATE, size, IPC_CREAT | 0o600))
    return view(succeed(libc.shmat(segment, None, 0)), size)
