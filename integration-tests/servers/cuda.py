"""A server that keeps its weights and its KV cache in device memory, reached through the CUDA driver by ctypes.

With the simulated driver nothing is computed on a device, and every answer says so.

    --library FILE          the driver
    --mib N                 size of the weights
    --kv-mib N              size of the KV cache
    --keep FOLDER           where examples/kv_cache/keep.py lies
    POST /sleep             gives the KV cache up and keeps its address
    POST /wake              takes it back, empty
    POST /generate          an answer that depends on the prompt and the weights; its state goes through the KV cache
    GET  /check             sums of the weights and of what lies in the KV cache
"""

import ctypes
import hashlib
import importlib.util
import signal
from pathlib import Path

from serving import BLOCK, Broken, Checks, arguments, block, expect, serve

SLOTS = 64
SLOT = 4096


class Device:
    """The driver's calls. Every result but 0 is an error."""

    def __init__(self, library):
        self.driver = ctypes.CDLL(library)
        self.call("cuInit", 0)
        self.context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), 0)
        name = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", name, 128, 0)
        self.name = name.value.decode()

    def call(self, name, *values):
        result = getattr(self.driver, name)(*values)
        if result:
            raise Broken(f"{name} is {result}, expected 0")

    def enter(self):
        """Makes the context current in this thread."""
        self.call("cuCtxSetCurrent", self.context)

    def allocate(self, size):
        self.enter()
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def write(self, address, content):
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), content, ctypes.c_size_t(len(content)))

    def read(self, address, size):
        buffer = ctypes.create_string_buffer(size)
        self.call("cuMemcpyDtoH_v2", buffer, ctypes.c_uint64(address), ctypes.c_size_t(size))
        return buffer.raw


def kept(folder):
    """The example's file, as a server would import it."""
    spec = importlib.util.spec_from_file_location("keep", Path(folder) / "keep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Kept


class Model:
    def __init__(self, device, options):
        mib = options.mib
        self.device, self.mib = device, mib
        self.weights = device.allocate(mib * BLOCK)
        self.kv = kept(options.keep)(options.kv_mib * BLOCK, library=options.library)
        self.cache = self.kv.address
        for index in range(mib):
            device.write(self.weights + index * BLOCK, block("weights", index))
        self.kept = {}

    def check_weights(self):
        self.device.enter()
        for index in range(self.mib):
            content = self.device.read(self.weights + index * BLOCK, BLOCK)
            expect(f"block {index} of the weights", hashlib.sha256(content).hexdigest(), hashlib.sha256(block("weights", index)).hexdigest())

    def check_cache(self):
        self.device.enter()
        for slot, content in self.kept.items():
            expect(f"slot {slot} of the KV cache", self.device.read(self.cache + slot * SLOT, len(content)), content)
        return len(self.kept)

    def check_interface(self):
        """What torch.as_tensor reads: bytes at the address that stays."""
        seen = self.kv.__cuda_array_interface__
        expect("interface", {key: seen[key] for key in ("shape", "typestr", "data")}, {"shape": (self.kv.size,), "typestr": "|u1", "data": (self.cache, False)})

    def sleep(self):
        self.kept.clear()
        self.kv.drop()
        # No tensor can be made of memory that is not there.
        try:
            interface = self.kv.__cuda_array_interface__
        except RuntimeError:
            interface = None
        expect("interface while dropped", interface, None)
        return {"present": self.kv.present}

    def wake(self):
        self.kv.take()
        expect("address of the KV cache", self.kv.address, self.cache)
        self.check_interface()
        return {"present": self.kv.present}

    def generate(self, prompt):
        self.device.enter()
        state = hashlib.sha256(prompt).digest()
        slot = state[0] % SLOTS
        for token in range(8):
            page = int.from_bytes(state[:8], "little") % (self.mib * BLOCK // SLOT)
            state = hashlib.sha256(state + self.device.read(self.weights + page * SLOT, SLOT)).digest()
            # Kept on the device, and read back for the next token.
            self.device.write(self.cache + slot * SLOT, state)
            state = self.device.read(self.cache + slot * SLOT, len(state))
        self.kept[slot] = state
        return state.hex()


def main():
    parser = arguments(__doc__)
    parser.add_argument("--library", default="libcuda.so.1")
    parser.add_argument("--mib", type=int, default=8)
    parser.add_argument("--kv-mib", type=int, default=2)
    parser.add_argument("--keep", required=True, help="folder of keep.py")
    options = parser.parse_args()
    device = Device(options.library)
    model = Model(device, options)
    checks = Checks()
    checks.add("weights", model.check_weights)
    checks.add("cache", model.check_cache)
    # A restored server is let go with its device memory; it is not to see the signal by which.
    continued = []
    signal.signal(signal.SIGCONT, lambda number, frame: continued.append(number))
    checks.add("signals", lambda: expect("SIGCONT seen", len(continued), 0))
    routes = {
        ("POST", "/generate"): lambda query, body: (200, {"answer": model.generate(body), "device": device.name}),
        ("POST", "/sleep"): lambda query, body: (200, model.sleep()),
        ("POST", "/wake"): lambda query, body: (200, model.wake()),
    }
    simulated = "simulated" in device.name.lower()
    print(f"{'simulated' if simulated else 'real'} device memory", flush=True)
    serve(options, checks, routes, about={"simulated": simulated})


if __name__ == "__main__":
    main()
