"""Makes the weights of the transformer: bf16, normal with a deviation of 0.02, from a seed, as one safetensors file.

The same size and seed give the same bytes. Memory stays below 200 MiB whatever the size: the file is written as it is made.
"""

import argparse
import os
import pathlib
import sys

import numpy

import layout

DEVIATION = 0.02
# Weights that are made at a time.
BLOCK = 4 << 20


def to_bf16(values: numpy.ndarray) -> numpy.ndarray:
    """Rounds float32 to its upper 16 bits, to nearest, ties to even. None of the values is NaN or infinite."""
    bits = values.view(numpy.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(numpy.uint16)


def write(path: pathlib.Path, shape: layout.Shape, seed: int) -> None:
    random = numpy.random.Generator(numpy.random.SFC64(seed))
    unfinished = path.with_name(path.name + ".part")
    with open(unfinished, "wb") as file:
        file.write(layout.header(shape, seed))
        for name, dimensions in shape.tensors():
            left = layout.product(dimensions)
            # Norms begin as one in every model.
            if name.endswith("norm.weight"):
                file.write(to_bf16(numpy.ones(left, numpy.float32)).tobytes())
                continue
            while left:
                count = min(left, BLOCK)
                file.write(to_bf16(random.standard_normal(count, numpy.float32) * numpy.float32(DEVIATION)).tobytes())
                left -= count
    # A file under this name is whole: the next run takes it as it is.
    os.replace(unfinished, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the weights of the transformer, once.")
    parser.add_argument("--size", type=layout.parse_size, required=True, metavar="SIZE", help="200MiB to 8GiB")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    try:
        shape = layout.Shape.of_size(arguments.size)
    except ValueError as error:
        sys.exit(f"make_weights: {error}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "model.safetensors"
    wanted = layout.header(shape, arguments.seed)
    if path.exists():
        with open(path, "rb") as file:
            found = file.read(len(wanted))
        if found == wanted and path.stat().st_size == len(wanted) + shape.weights_bytes():
            print(f"{path} is there already")
            return
    write(path, shape, arguments.seed)
    print(
        f"{path}: {shape.weights_bytes() / (1 << 20):.0f} MiB, {shape.layers} layers of width {shape.width}, "
        f"feed-forward {shape.hidden}, seed {arguments.seed}"
    )


if __name__ == "__main__":
    main()
