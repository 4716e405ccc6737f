"""The application on a local Ray cluster, with two replicas."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.long

# In a process of its own: a cluster leaves threads and signal handlers behind.
SCENARIO = """
    import asyncio, json, httpx, ray
    from ray import serve
    from csm_jax.serve.ray_app import build

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": %PORT%})
    arguments = {"checkpoint": "demo", "max_batch": "2", "max_seq_len": "256",
                 "min_replicas": "2", "max_replicas": "2"}
    serve.run(build(arguments), route_prefix="/")
    url = "http://127.0.0.1:%PORT%"

    async def ask(client, i):
        body = {"text": "one two three", "seed": i % 4, "streaming": bool(i % 2)}
        answer = await client.post(url + "/generate", json=body)
        return i % 4, answer.status_code, len(answer.content)

    async def main():
        async with httpx.AsyncClient(timeout=300) as client:
            answers = await asyncio.gather(*(ask(client, i) for i in range(16)))
        return answers

    answers = asyncio.run(main())
    replicas = serve.status().applications["default"].deployments["csm_jax"].replica_states
    print(json.dumps({"answers": answers, "replicas": {str(k): v for k, v in replicas.items()}}))
    serve.shutdown()
"""


def test_two_replicas_say_the_same(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    code = textwrap.dedent(SCENARIO).replace("%PORT%", port)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["replicas"] == {"RUNNING": 2}
    assert {status for _, status, _ in found["answers"]} == {200}
    lengths: dict[int, set[int]] = {}
    for seed, _, length in found["answers"]:
        lengths.setdefault(seed, set()).add(length)
    assert all(len(each) == 1 for each in lengths.values())


def test_an_argument_that_is_none_is_said():
    from csm_jax.serve.ray_app import build

    with pytest.raises(ValueError, match="unknown argument max_bath"):
        build({"max_bath": "3"})
