#!/usr/bin/env python3
"""Tries `policy.py` and `scale.py` with a real Ray Serve on this machine. `setup/ray` runs it; takes about a minute.

1. A deployment with the policy goes from zero to as many replicas as a burst needs, and back to zero.
2. A deployment with an external scaler follows what a pool of Rewarm wants, as `scale.py` reads it from an event stream.
"""

import http.server
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["PYTHONPATH"] = str(HERE)
# A cluster that lives for a minute on loopback; without this Ray writes a token into the home folder.
os.environ["RAY_AUTH_MODE"] = "disabled"
PATIENCE_S = 180

import ray  # noqa: E402
from ray import serve  # noqa: E402


def until(what, condition):
    """Waits for a condition, and says what did not come."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.2)
    print(f"ok: {what}", flush=True)


def replicas(application, deployment):
    """How many run; nothing while Ray does not know the deployment yet."""
    found = serve.status().applications.get(application)
    found = found and found.deployments.get(deployment)
    return found and found.replica_states.get("RUNNING", 0)


def policy():
    """Requests of 2 s each, two at a time in a replica: eight at once need four."""

    @serve.deployment(
        max_ongoing_requests=2,
        ray_actor_options={"num_cpus": 0},
        autoscaling_config={
            "min_replicas": 0, "max_replicas": 4, "initial_replicas": 0, "target_ongoing_requests": 2,
            "upscale_delay_s": 0, "downscale_delay_s": 0, "downscale_to_zero_delay_s": 0,
            "metrics_interval_s": 0.5, "look_back_period_s": 0.5,
            "policy": {"policy_function": "policy:RestoreAware", "policy_kwargs": {"start_s": 1.0, "keep": 1, "keep_last": 2}},
        },
    )
    class Sleeper:
        async def __call__(self, seconds):
            import asyncio
            await asyncio.sleep(seconds)
            return os.getpid()

    handle = serve.run(Sleeper.bind(), name="policy", route_prefix="/policy")
    until("no replica while nobody asks", lambda: replicas("policy", "Sleeper") == 0)
    began = time.monotonic()
    answers = [handle.remote(8.0) for _ in range(8)]
    until("four replicas for eight requests, two at a time", lambda: replicas("policy", "Sleeper") == 4)
    pids = {answer.result(timeout_s=PATIENCE_S) for answer in answers}
    print(f"ok: all answered, by {len(pids)} replicas, the last after {time.monotonic() - began:.1f} s", flush=True)
    until("none again when nobody asks", lambda: replicas("policy", "Sleeper") == 0)


class Pool(http.server.BaseHTTPRequestHandler):
    """The event stream of a pool that wants `wanted` replicas."""

    wanted = 0

    def do_GET(self):
        assert self.path == "/admin/events" and self.headers["authorization"] == "Bearer secret"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        while True:
            status = {"pools": [{"name": "llama", "desired": Pool.wanted}]}
            try:
                self.wfile.write(f"event: status\ndata: {json.dumps(status)}\n\n".encode())
            except OSError:
                return
            time.sleep(0.2)

    def log_message(self, *_):
        pass


def external(folder):
    (folder / "app.py").write_text(
        "from ray import serve\n"
        "@serve.deployment(ray_actor_options={'num_cpus': 0})\n"
        "class Llama:\n"
        "    def __call__(self, request):\n"
        "        return 'llama'\n"
        "app = Llama.bind()\n"
    )
    config = {
        "proxy_location": "Disabled",
        "applications": [{
            "name": "external", "route_prefix": "/external", "import_path": "app:app", "external_scaler_enabled": True,
            "runtime_env": {"env_vars": {"PYTHONPATH": str(folder)}},
            "deployments": [{"name": "Llama", "num_replicas": 1}],
        }],
    }
    (folder / "config.json").write_text(json.dumps(config))
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{HERE}", "REWARM_TOKEN": "secret"}
    subprocess.run([pathlib.Path(sys.executable).with_name("serve"), "deploy", folder / "config.json"], env=environment, check=True)
    until("one replica, as configured", lambda: replicas("external", "Llama") == 1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pool)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Pool.wanted = 3
    scaler = subprocess.Popen(
        [sys.executable, HERE / "scale.py", "--rewarm", f"http://127.0.0.1:{server.server_port}", "--pool", "llama",
         "--ray", "http://127.0.0.1:8265", "--application", "external", "--deployment", "Llama"], env=environment)
    try:
        until("three, as the pool wants", lambda: replicas("external", "Llama") == 3)
        Pool.wanted = 2
        until("two, as the pool wants", lambda: replicas("external", "Llama") == 2)
    finally:
        scaler.terminate()
        scaler.wait()
        server.shutdown()


def main():
    with tempfile.TemporaryDirectory() as folder:
        ray.init(num_cpus=2, include_dashboard=True, dashboard_port=8265, log_to_driver=False, object_store_memory=100 << 20,
                 runtime_env={"env_vars": {"PYTHONPATH": str(HERE)}})
        try:
            serve.start(proxy_location="Disabled")
            external(pathlib.Path(folder))
            policy()
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
