"""A text generation server around the transformer of model.py.

    POST /generate      {"prompt": "...", "max_tokens": 16} -> {"tokens": [...], "log_probabilities": [...], "text": "..."}
    GET  /healthz       {"ready": true, ...}
    GET  /state_digest  a digest of every weight as it lies in memory
"""

import argparse
import asyncio
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

# Replicas share processors: a worker that waits should sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# oneDNN would use AMX tiles where a processor has them, and CRIU does not carry these; and so the answers are the same
# inside a replica, where Rewarm denies the tiles, and outside.
os.environ.setdefault("DNNL_MAX_CPU_ISA", "AVX512_CORE_BF16")

import fastapi
import pydantic
import torch
import uvicorn

import model

GENERATED_MAX = 512


class Question(pydantic.BaseModel):
    prompt: str = pydantic.Field(max_length=1 << 16)
    max_tokens: int = pydantic.Field(default=16, ge=1, le=GENERATED_MAX)


class Answer(pydantic.BaseModel):
    tokens: list[int]
    log_probabilities: list[float]
    text: str


def create_app(weights: pathlib.Path, sparse: bool, device: str) -> fastapi.FastAPI:
    # One thread computes: requests queue for it, and PyTorch keeps a single team of workers.
    compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    async def computed(function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(compute, function, *arguments)

    def load() -> model.Transformer:
        transformer = model.Transformer(weights, sparse, device)
        # oneDNN makes its kernels when it first sees a shape; the first user should not wait for that.
        transformer.generate("Ready?", 2)
        return transformer

    @asynccontextmanager
    async def lifespan(app: fastapi.FastAPI):
        app.state.transformer = await computed(load)
        yield
        compute.shutdown()

    app = fastapi.FastAPI(title="transformer", lifespan=lifespan)

    @app.get("/healthz")
    async def healthz() -> dict:
        shape = app.state.transformer.shape
        return {"ready": True, "layers": shape.layers, "width": shape.width, "weights_bytes": shape.weights_bytes(), "sparse": sparse}

    @app.post("/generate")
    async def generate(question: Question) -> Answer:
        tokens, log_probabilities = await computed(app.state.transformer.generate, question.prompt, question.max_tokens)
        text = bytes(tokens).decode(errors="replace")
        return Answer(tokens=tokens, log_probabilities=log_probabilities, text=text)

    @app.get("/state_digest")
    async def state_digest() -> dict:
        digest, count = await computed(app.state.transformer.digest)
        return {"sha256": digest, "bytes": count}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="A text generation server.")
    parser.add_argument("--weights", type=pathlib.Path, required=True, metavar="FILE", help="that make_weights.py wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; the same number gives the same bits")
    parser.add_argument("--device", default="cpu", help="cuda: weights and cache lie on a GPU")
    parser.add_argument(
        "--touch", choices=("all", "sparse"), default="all", help="sparse: an answer uses a tenth of the weights"
    )
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    app = create_app(arguments.weights, sparse=arguments.touch == "sparse", device=arguments.device)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="info", access_log=False)


if __name__ == "__main__":
    main()
