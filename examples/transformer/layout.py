"""What a model of a wanted size looks like: shapes, and where they lie in a safetensors file."""

import json
import re
import struct
from dataclasses import asdict, dataclass

WEIGHTS_BYTES_MIN = 200 << 20
WEIGHTS_BYTES_MAX = 8 << 30
# Every byte is a token, and one more begins a text. None ends it: weights that mean nothing cannot choose it well.
VOCABULARY = 257
BEGIN = 256
HEAD = 64
# A format rule of safetensors: the header's length is a multiple of 8.
ALIGNMENT = 8


@dataclass(frozen=True)
class Shape:
    """Of a decoder-only transformer: rotary attention without biases, gated feed-forward, embeddings not tied."""

    width: int
    layers: int
    hidden: int

    @property
    def heads(self) -> int:
        return self.width // HEAD

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the file, which is the order of use."""
        width, hidden = self.width, self.hidden
        tensors = [("embedding.weight", (VOCABULARY, width))]
        for layer in range(self.layers):
            tensors += [
                (f"layers.{layer}.attention_norm.weight", (width,)),
                (f"layers.{layer}.attention.qkv.weight", (3 * width, width)),
                (f"layers.{layer}.attention.out.weight", (width, width)),
                (f"layers.{layer}.feed_forward_norm.weight", (width,)),
                (f"layers.{layer}.feed_forward.gate_up.weight", (2 * hidden, width)),
                (f"layers.{layer}.feed_forward.down.weight", (width, hidden)),
            ]
        return tensors + [("norm.weight", (width,)), ("head.weight", (VOCABULARY, width))]

    def weights_bytes(self) -> int:
        """Two bytes a weight."""
        return sum(2 * product(shape) for _, shape in self.tensors())

    @classmethod
    def of_size(cls, wanted_bytes: int) -> "Shape":
        """The widest model of about `wanted_bytes` that has at least 20 layers, so that a tenth of them is a number."""
        if not WEIGHTS_BYTES_MIN <= wanted_bytes <= WEIGHTS_BYTES_MAX:
            raise ValueError(f"size is {wanted_bytes} bytes, expected {WEIGHTS_BYTES_MIN} to {WEIGHTS_BYTES_MAX}")
        for width in (4096, 2048, 1024, 512):
            # Attention has 4 width^2 weights; feed-forward with the usual 8/3 of the width has 8 width^2.
            layers = round(wanted_bytes / (2 * 12 * width * width))
            if layers >= 20:
                break
        # What rounding the number of layers took or gave, the feed-forward part balances, in steps that kernels like.
        rest = wanted_bytes / 2 - 2 * VOCABULARY * width - layers * 4 * width * width
        hidden = max(64, round(rest / (layers * 3 * width) / 64) * 64)
        return cls(width=width, layers=layers, hidden=hidden)


def product(shape: tuple[int, ...]) -> int:
    result = 1
    for factor in shape:
        result *= factor
    return result


def parse_size(text: str) -> int:
    """`512MiB`, `1GiB` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB)?", text)
    if match is None:
        raise ValueError(f"size is {text!r}, expected a number with B, KiB, MiB or GiB")
    return int(float(match[1]) * {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[match[2]])


def header(shape: Shape, seed: int) -> bytes:
    """The head of the file: a length, then JSON with each tensor's type, shape and place among the data."""
    entries: dict = {"__metadata__": {"seed": str(seed), **{key: str(value) for key, value in asdict(shape).items()}}}
    offset = 0
    for name, dimensions in shape.tensors():
        end = offset + 2 * product(dimensions)
        entries[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
