#!/usr/bin/env python3
"""Carries out with Ray Serve what a pool of `rewarm serve` wants.

    scale.py --rewarm http://127.0.0.1:9901 --pool llama --ray http://127.0.0.1:8265 --application default --deployment Llama

Follows Rewarm's event stream and sends each change of `desired` to Ray's REST call `scale`. The deployment needs
`external_scaler_enabled: true` and no `autoscaling_config`: nobody else may write its number of replicas. Tokens come from
the environment (REWARM_TOKEN, RAY_TOKEN), so that no list of processes shows them.
"""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

# The stream says something each second; what is silent for longer is gone.
SILENCE_S = 10
RETRY_S = 1.0


def request(url, token, body=None):
    headers = {"content-type": "application/json"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=SILENCE_S)


def desired(rewarm, pool, token):
    """Yields what the pool wants, again and again."""
    with request(f"{rewarm}/admin/events", token) as stream:
        event = ""
        for line in stream:
            name, _, value = line.decode().rstrip("\n").partition(":")
            if name == "event":
                event = value.strip()
            elif name == "data" and event == "status":
                pools = {found["name"]: found for found in json.loads(value)["pools"]}
                if pool not in pools:
                    raise LookupError(f"no pool is called {pool!r}; there are: {', '.join(pools)}")
                yield pools[pool]["desired"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewarm", default="http://127.0.0.1:9901")
    parser.add_argument("--pool", required=True)
    parser.add_argument("--ray", default="http://127.0.0.1:8265")
    parser.add_argument("--application", default="default")
    parser.add_argument("--deployment", required=True)
    options = parser.parse_args()
    quote = lambda name: urllib.parse.quote(name, safe="")  # noqa: E731
    scale = f"{options.ray}/api/v1/applications/{quote(options.application)}/deployments/{quote(options.deployment)}/scale"
    told = None
    while True:
        try:
            for replicas in desired(options.rewarm, options.pool, os.environ.get("REWARM_TOKEN")):
                if replicas != told:
                    with request(scale, os.environ.get("RAY_TOKEN"), {"target_num_replicas": replicas}):
                        print(f"{options.deployment}: {replicas} replicas", flush=True)
                    told = replicas
            problem = "the stream ended"
        except urllib.error.HTTPError as error:
            problem = f"{error.url}: {error.code} {error.read().decode(errors='replace')[:200]}"
        except (OSError, LookupError) as error:
            problem = str(error)
        # Ray may have been told something else meanwhile, or be a new one.
        told = None
        print(f"{problem}; once more in {RETRY_S:.0f} s", file=sys.stderr, flush=True)
        time.sleep(RETRY_S)


if __name__ == "__main__":
    main()
