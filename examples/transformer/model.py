"""The transformer: weights as bf16 in the process's own memory, answers by greedy decoding."""

import hashlib
import json
import math
import pathlib
import struct
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import embedding, linear, silu, softmax

import layout

HEADER_BYTES_MAX = 16 << 20
TOKENS_MAX = 1024
# Readers of the file: more than one keeps both the disk and the page faults of the new memory busy.
READERS = 2


def read_weights(path: pathlib.Path, device: str) -> tuple[layout.Shape, dict[str, torch.Tensor]]:
    """Reads all tensors of a safetensors file that make_weights.py wrote.

    They are read, not mapped: a server that quantises, shards or merges its weights has them in memory of its own too.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > HEADER_BYTES_MAX:
            raise ValueError(f"{path}: header is {length} bytes long, expected at most {HEADER_BYTES_MAX}")
        entries = json.loads(file.read(length))
    metadata = entries.pop("__metadata__")
    shape = layout.Shape(*(int(metadata[key]) for key in ("width", "layers", "hidden")))
    data = 8 + length

    def read(name_and_dimensions: tuple[str, tuple[int, ...]]) -> tuple[str, torch.Tensor]:
        name, dimensions = name_and_dimensions
        entry = entries[name]
        begin, end = entry["data_offsets"]
        if entry["dtype"] != "BF16" or tuple(entry["shape"]) != dimensions or end - begin != 2 * layout.product(dimensions):
            raise ValueError(f"{path}: {name} is {entry}, expected BF16 of {dimensions}")
        tensor = torch.empty(dimensions, dtype=torch.bfloat16)
        with open(path, "rb", buffering=0) as file:
            file.seek(data + begin)
            into = memoryview(as_bytes(tensor))
            while into.nbytes:
                count = file.readinto(into)
                if not count:
                    raise ValueError(f"{path}: ends inside {name}, {into.nbytes} bytes are missing")
                into = into[count:]
        return name, tensor.to(device)

    with ThreadPoolExecutor(READERS) as readers:
        return shape, dict(readers.map(read, shape.tensors()))


def as_bytes(tensor: torch.Tensor):
    """The memory of a tensor itself, as a flat array of bytes."""
    return tensor.view(-1).view(torch.uint8).numpy()


class Transformer:
    """`generate` must be called from one thread at a time; it starts from nothing each time, so answers do not depend on earlier ones."""

    def __init__(self, path: pathlib.Path, sparse: bool, device: str = "cpu"):
        self.device = device
        self.shape, self.weights = read_weights(path, device)
        # Sparse: each token goes through every tenth layer only, as in models that skip layers or route to experts.
        self.layers = list(range(0, self.shape.layers, 10 if sparse else 1))
        if sparse:
            self.layers = self.layers[: max(1, self.shape.layers // 10)]
        frequencies = 10000.0 ** (-torch.arange(0, layout.HEAD, 2) / layout.HEAD)
        angles = torch.outer(torch.arange(TOKENS_MAX), frequencies)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    @torch.inference_mode()
    def generate(self, prompt: str, tokens_max: int) -> tuple[list[int], list[float]]:
        """The most probable next tokens, and the logarithm of each one's probability."""
        context = [layout.BEGIN, *prompt.encode()][-(TOKENS_MAX - tokens_max) :]
        shape = (len(self.layers), 2, self.shape.heads, len(context) + tokens_max, layout.HEAD)
        cache = torch.empty(shape, dtype=torch.float32, device=self.device)
        tokens, log_probabilities = [], []
        position = 0
        step = context
        for _ in range(tokens_max):
            logits = self.forward(torch.tensor(step, device=self.device), position, cache)
            position += len(step)
            scores = torch.log_softmax(logits[: layout.BEGIN], dim=0)
            token = int(scores.argmax())
            tokens.append(token)
            log_probabilities.append(float(scores[token]))
            step = [token]
        return tokens, log_probabilities

    def forward(self, tokens: torch.Tensor, position: int, cache: torch.Tensor) -> torch.Tensor:
        """Logits after the last of `tokens`, which stand at `position`; keys and values before that are in `cache`."""
        weights = self.weights
        x = embedding(tokens, weights["embedding.weight"]).float()
        for slot, layer in enumerate(self.layers):
            name = f"layers.{layer}"
            x = x + self.attention(name, self.norm(x, f"{name}.attention_norm"), position, cache[slot])
            gate, up = self.multiply(self.norm(x, f"{name}.feed_forward_norm"), f"{name}.feed_forward.gate_up").chunk(2, dim=1)
            x = x + self.multiply(silu(gate) * up, f"{name}.feed_forward.down")
        return self.multiply(self.norm(x[-1:], "norm"), "head")[0]

    def attention(self, name: str, x: torch.Tensor, position: int, cache: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        end = position + count
        qkv = self.multiply(x, f"{name}.attention.qkv").view(count, 3, self.shape.heads, layout.HEAD)
        query, key, value = qkv.permute(1, 2, 0, 3)
        cache[0, :, position:end] = self.rotate(key, position)
        cache[1, :, position:end] = value
        scores = self.rotate(query, position) @ cache[0, :, :end].transpose(1, 2) / math.sqrt(layout.HEAD)
        if count > 1:
            later = torch.ones(count, end, dtype=torch.bool, device=self.device).triu(position + 1)
            scores = scores.masked_fill(later, -math.inf)
        mixed = softmax(scores, dim=2) @ cache[1, :, :end]
        return self.multiply(mixed.transpose(0, 1).reshape(count, -1), f"{name}.attention.out")

    def rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        cos, sin = (table[position : position + x.shape[1]] for table in (self.cos, self.sin))
        first, second = x.chunk(2, dim=2)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=2)

    def multiply(self, x: torch.Tensor, name: str) -> torch.Tensor:
        # oneDNN multiplies bf16 by bf16 and adds in float32.
        return linear(x.bfloat16(), self.weights[f"{name}.weight"]).float()

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6) * self.weights[f"{name}.weight"].float()

    def digest(self) -> tuple[str, int]:
        """SHA-256 over the digests of all tensors, in the order of the file, read from memory; and how many bytes that are."""

        def one(tensor: torch.Tensor) -> bytes:
            return hashlib.sha256(as_bytes(tensor.cpu())).digest()

        with ThreadPoolExecutor(READERS) as threads:
            digests = threads.map(one, self.weights.values())
            return hashlib.sha256(b"".join(digests)).hexdigest(), self.shape.weights_bytes()
