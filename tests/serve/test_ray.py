"""The application on a local Ray cluster, with two replicas."""

import base64
import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
from serving import same

pytest.importorskip("ray")
pytestmark = pytest.mark.long

# Runs in a separate process, because a cluster leaves threads and signal handlers behind.
SCENARIO = """
    import asyncio, base64, json, pathlib, sys, httpx, ray
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
        return i % 4, answer.status_code, base64.b64encode(answer.content).decode()

    async def main():
        async with httpx.AsyncClient(timeout=300) as client:
            answers = await asyncio.gather(*(ask(client, i) for i in range(16)))
        return answers

    answers = asyncio.run(main())
    replicas = serve.status().applications["default"].deployments["csm_jax"].replica_states
    found = {"answers": answers, "replicas": {str(k): v for k, v in replicas.items()}}
    pathlib.Path(sys.argv[1]).write_text(json.dumps(found))
    serve.shutdown()
"""


def test_two_replicas_generate_the_same_speech(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    code = textwrap.dedent(SCENARIO).replace("%PORT%", port)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", code, tmp_path / "found"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found").read_text())
    assert found["replicas"] == {"RUNNING": 2}
    assert {status for _, status, _ in found["answers"]} == {200}
    spoken: dict[int, list[bytes]] = {}
    for seed, _, content in found["answers"]:
        spoken.setdefault(seed, []).append(base64.b64decode(content))
    assert len(spoken) == 4
    for first, *others in spoken.values():
        assert len(first) > 10_000
        assert all(same(first, other) for other in others)


def test_an_unknown_argument_is_named_in_the_error():
    from csm_jax.serve.ray_app import build

    with pytest.raises(ValueError, match="unknown argument max_bath"):
        build({"max_bath": "3"})


def test_a_wrong_key_of_a_watermark_is_named_before_a_replica_starts():
    from csm_jax.serve.ray_app import build

    with pytest.raises(ValueError, match="1,2,300,4,5"):
        build({"watermark_key": "1,2,300,4,5"})
