"""Device memory whose address stays while the memory itself is given up: for a KV cache around a snapshot.

A KV cache is most of what a language model's server has on its device, and nothing of it is worth carrying: after `drop` a
snapshot is as large as the weights. The address stays reserved, so CUDA graphs and pointers that name it are right again
after `take`. What was in the cache is gone: drop it only while no request is being worked on.

    cache = Kept(8 << 30)
    tensor = torch.as_tensor(cache, device="cuda")      # bytes; .view(torch.float16) and shape as you like
    ...
    cache.drop()        # before a snapshot
    cache.take()        # after it, and in each restored replica

It needs the driver's library and nothing else. One address range is made once (cuMemAddressReserve), memory is made, mapped, unmapped
and released as wanted (cuMemCreate, cuMemMap, cuMemUnmap, cuMemRelease).
"""

import ctypes
import threading

PINNED, ON_DEVICE, READ_WRITE = 1, 1, 3


class _Location(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("number", ctypes.c_int)]


class _Properties(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class CudaError(RuntimeError):
    """A call of the driver with another result than 0."""


class Kept:
    """Device memory of a size, at an address that stays."""

    def __init__(self, size, device=0, library="libcuda.so.1"):
        self._driver, self._device = ctypes.CDLL(library), device
        self._call("cuInit", 0)
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._lock = threading.Lock()
        self._properties = _Properties(kind=PINNED, location=_Location(ON_DEVICE, device))
        granule = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(granule), ctypes.byref(self._properties), 0)
        self.size = -(-size // granule.value) * granule.value
        address = ctypes.c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(address), *self._sizes(self.size, 0), ctypes.c_uint64(0), ctypes.c_uint64(0))
        self.address, self._handle = address.value, None
        self.take()

    @property
    def present(self):
        """Whether there is memory at the address."""
        return self._handle is not None

    def take(self):
        """Puts fresh memory at the address; does nothing where there is some. Raises CudaError where the device is full."""
        with self._lock:
            if self.present:
                return
            self._enter()
            handle = ctypes.c_uint64()
            (size,) = self._sizes(self.size)
            self._call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), ctypes.c_uint64(0))
            try:
                self._call("cuMemMap", self._at(), size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
                try:
                    access = _Access(self._properties.location, READ_WRITE)
                    self._call("cuMemSetAccess", self._at(), size, ctypes.byref(access), ctypes.c_size_t(1))
                except CudaError:
                    self._call("cuMemUnmap", self._at(), size)
                    raise
            except CudaError:
                self._call("cuMemRelease", handle)
                raise
            self._handle = handle

    def drop(self):
        """Gives the memory up once all work on the device is done, and keeps the address."""
        with self._lock:
            if not self.present:
                return
            self._enter()
            self._call("cuCtxSynchronize")
            self._call("cuMemUnmap", self._at(), *self._sizes(self.size))
            handle, self._handle = self._handle, None
            self._call("cuMemRelease", handle)

    @property
    def __cuda_array_interface__(self):
        """How PyTorch, CuPy and Numba see it: as bytes."""
        if not self.present:
            raise CudaError("the memory was dropped; take() brings it back")
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def _at(self):
        return ctypes.c_uint64(self.address)

    def _sizes(self, *sizes):
        return [ctypes.c_size_t(size) for size in sizes]

    def _enter(self):
        self._call("cuCtxSetCurrent", self._context)

    def _call(self, name, *values):
        result = getattr(self._driver, name)(*values)
        if result:
            raise CudaError(f"{name} is {result}, expected 0")
