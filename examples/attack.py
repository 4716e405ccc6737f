"""Attacks a server of this machine, and reports which attacks failed.

    python examples/attack.py --start
    python examples/attack.py --url=http://127.0.0.1:8000 --pid=$(pgrep -f csm_jax.serve)
    python examples/attack.py --start --only=idle_connections,long_texts --json=attacks.json

A well-behaved client with another address runs beside each attack. The server has held if the
attack failed and this client got its responses in time. Addresses of other machines are refused.
The program takes less than an hour. The exit code is 1 if an attack succeeded.
"""

import asyncio
import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from absl import app, flags, logging
from attacks import (  # noqa: F401, they register
    access,
    bodies,
    connections,
    page,
    protocol,
    recordings,
    speech,
    tenants,
)
from attacks.bystander import Experience, watching
from attacks.registry import ATTACKS, Attack, Server
from attacks.target import SETTLE_SECONDS, BrokeError, Target, check_loopback, start

URL = flags.DEFINE_string("url", None, "address of a running server, http://127.0.0.1:PORT")
PID = flags.DEFINE_integer("pid", None, "its process id, for its memory")
KEYS = flags.DEFINE_list("keys", [], "three of its keys, of different tenants, if it has any")
START = flags.DEFINE_boolean("start", False, "start servers with the demo checkpoint")
ONLY = flags.DEFINE_list("only", [], "names of attacks; default: all")
LIST = flags.DEFINE_boolean("list", False, "print the names, and end")
CONNECTIONS = flags.DEFINE_integer("connections", 5000, "idle connections", 1, 50_000)
PROBE_S = flags.DEFINE_float("probe_s", 2.0, "limit of /healthz during an attack")
FIRST_S = flags.DEFINE_float("first_s", 6.0, "limit of the first audio during an attack")
MEMORY_MB = flags.DEFINE_float("memory_mb", 400.0, "limit of additional memory after an attack")
JSON = flags.DEFINE_string("json", None, "a file for the results")

# Time limit of one attack, which has succeeded if it takes longer.
_ATTACK_SECONDS = 240
_FLAGS = {Server.KEYS: ["--max_batch=4", "--max_seq_len=256"], Server.OPEN: []}
_FLAGS[Server.LIMITED] = [*_FLAGS[Server.KEYS], "--requests_per_minute=60"]
_FLAGS[Server.OWN] = _FLAGS[Server.KEYS]


@dataclass
class Result:
    """The result of one attack."""

    attack: str
    tried: str
    happened: str
    held: bool
    figures: dict[str, float | None] = field(default_factory=dict)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    wanted = [each for each in ATTACKS if not ONLY.value or each.name in ONLY.value]
    if LIST.value or not wanted or not (START.value or URL.value):
        print("\n".join(f"{each.name:28} {each.tried}" for each in ATTACKS))
        return
    _allow_files(CONNECTIONS.value + 1000)
    results = []
    for server in Server:
        attacks = [each for each in wanted if each.server is server]
        if attacks and (target := _target(server)):
            with target as running:
                running.num_idle = CONNECTIONS.value
                results += asyncio.run(_run_all(running, attacks))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps([asdict(each) for each in results], indent=1))
    print(f"\n{sum(each.held for each in results)} of {len(results)} held")
    raise SystemExit(not all(each.held for each in results))


def _allow_files(count: int) -> None:
    """Raises the limit of open files of this process and of the servers that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, min(3 * count, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _target(server: Server) -> contextlib.AbstractContextManager[Target] | None:
    """The server of this kind; None if there is none."""
    if START.value:
        return _started(server)
    try:
        check_loopback(URL.value)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    has_keys = len(KEYS.value) >= 3
    if server is (Server.KEYS if has_keys else Server.OPEN):
        target = Target(URL.value.rstrip("/"), PID.value, KEYS.value)
        return contextlib.nullcontext(target)
    return None


@contextlib.contextmanager
def _started(server: Server) -> Iterator[Target]:
    num_keys = 3 if server is Server.KEYS else 0
    with (
        tempfile.TemporaryDirectory() as directory,
        start(Path(directory, "server"), *_FLAGS[server], num_keys=num_keys) as target,
    ):
        yield target


async def _run_all(target: Target, attacks: list[Attack]) -> list[Result]:
    with watching(target) as before:
        await asyncio.sleep(5)
    print(f"\na server {attacks[0].server.value}; undisturbed: {before.figures()}", flush=True)
    results = []
    for each in attacks:
        results.append(await _run(target, each))
        print(_line(results[-1]), flush=True)
    return results


async def _run(target: Target, attack: Attack) -> Result:
    memory, started = target.memory_mb(), time.monotonic()
    broken, happened = [], ""
    with contextlib.ExitStack() as stack:
        survives = attack.server is not Server.OWN
        seen = stack.enter_context(watching(target)) if survives else Experience()
        try:
            async with asyncio.timeout(_ATTACK_SECONDS):
                happened = await attack.run(target)
        except BrokeError as error:
            broken.append(str(error))
        except TimeoutError:
            broken.append("the server did not answer in time")
        except Exception as error:
            broken.append(f"{type(error).__name__}: {error}"[:200])
    figures = {"seconds": round(time.monotonic() - started), **seen.figures()}
    if survives:
        broken += _complaints(seen) if attack.floods else []
        more, left = await _after(target, memory)
        figures, broken = figures | more, broken + left
    text = "; ".join([*broken, happened] if happened else broken)
    return Result(attack.name, attack.tried, text, not broken, figures)


def _complaints(seen: Experience) -> list[str]:
    """The limits that the bystander's measurements exceed."""
    complaints = []
    if seen.failures:
        kinds = sorted(set(seen.failures))
        complaints.append(f"bystander: {len(seen.failures)} failures ({', '.join(kinds)[:80]})")
    if max(seen.probe_s, default=0) > PROBE_S.value:
        complaints.append(f"bystander: probes took {max(seen.probe_s):.1f} s")
    if max(seen.first_s, default=0) > FIRST_S.value:
        complaints.append(f"bystander: first audio took {max(seen.first_s):.1f} s")
    return complaints


async def _after(target: Target, memory: float | None) -> tuple[dict, list[str]]:
    """Measurements after the attack, and the limits that they exceed."""
    try:
        left = await target.wait_until_idle(SETTLE_SECONDS)
    except Exception as error:
        return {}, [f"afterwards: {type(error).__name__}"]
    now = target.memory_mb()
    figures = {**left, "connections": target.connections(), "memory_mb": now}
    broken = []
    if sum(left.values()):
        broken.append(f"requests are still running after {SETTLE_SECONDS} s: {left}")
    if now and memory and now - memory > MEMORY_MB.value:
        broken.append(f"memory grew by {now - memory:.0f} MB")
    figures["memory_before_mb"] = memory
    return figures, broken


def _line(result: Result) -> str:
    state = "held " if result.held else "BROKE"
    figures = " ".join(f"{name}={value:g}" for name, value in result.figures.items() if value)
    return f"{state} | {result.attack} | {result.tried} | {result.happened} | {figures}"


if __name__ == "__main__":
    app.run(main)
