"""The attacked server: its address, its process and its metrics."""

import asyncio
import contextlib
import importlib.util
import ipaddress
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import websockets

# All of 127.0.0.0/8 is this machine: the attacker and the bystander have different addresses.
ATTACKER = "127.0.0.1"
BYSTANDER = "127.0.0.2"
READY_SECONDS = 600
# The usual default limit of open files of a process.
_USUAL_FILES = 1024
# Time for a server to end the work for clients that have disconnected.
SETTLE_SECONDS = 30
# A preset of the server: every tenant can use it, and none may change it.
HOUSE_VOICE = "house"
# Written to a file that no client may read.
SECRET = "what only the operator may read"  # noqa: S105, it is not a password
JSON_TYPE = {"Content-Type": "application/json"}
# Nearly 10 000 characters.
LONG_TEXT = " ".join(["one two three four five six seven."] * 250)


class BrokeError(Exception):
    """An attack has succeeded; the message says how."""


@dataclass
class Target:
    """A running server.

    Attributes:
      url: its address, without a slash at the end.
      pid: its process, for memory and connections; None if unknown.
      keys: keys of two tenants and of the bystander; empty if the server has no keys.
      home: the directory of a server that this program has started: `secret.txt` contains `SECRET`,
        `log` is the server's output, `data` is its --data.
      process: the process of such a server.
      num_idle: number of idle connections that an attack opens.
    """

    url: str
    pid: int | None = None
    keys: list[str] = field(default_factory=list)
    home: Path | None = None
    process: subprocess.Popen | None = None
    num_idle: int = 5000

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname, parts.port or 80

    @property
    def socket_url(self) -> str:
        return f"ws{self.url[4:]}/v1/realtime"

    def headers(self, tenant: int = 0) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"} if self.keys else {}

    def client(self, tenant: int = 0, address: str = ATTACKER, **more) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(local_address=address)
        headers = self.headers(tenant)
        return httpx.AsyncClient(
            base_url=self.url, transport=transport, headers=headers, timeout=60, **more
        )

    def socket(self, tenant: int = 0, **more) -> websockets.connect:
        more = {"max_size": None, "open_timeout": 20, "close_timeout": 1} | more
        more = {"additional_headers": self.headers(tenant), "local_addr": (ATTACKER, 0)} | more
        return websockets.connect(self.socket_url, **more)

    async def connect(self, address: str = ATTACKER) -> tuple:
        """Opens a raw connection with a small receive buffer; returns its reader and writer."""
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        raw.bind((address, 0))
        async with asyncio.timeout(20):
            await asyncio.get_running_loop().sock_connect(raw, self.address)
        return await asyncio.open_connection(sock=raw)

    def head(self, method: str, path: str, **headers: object) -> bytes:
        """The head of an HTTP/1.1 request."""
        given = {"Host": "{}:{}".format(*self.address), **self.headers(), **headers}
        lines = [f"{method} {path} HTTP/1.1"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in given.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    def memory_mb(self) -> float | None:
        """Resident memory of the server in MB."""
        if self.pid is None:
            return None
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        return None

    def peak_memory_mb(self) -> float | None:
        """The most that has been resident since the server started."""
        if self.pid is None:
            return None
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            return round(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e3)
        return None

    def connections(self) -> int:
        """Established TCP connections to the server's port."""
        port = f":{self.address[1]:04X}"
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        return sum(
            fields[1].endswith(port) and fields[3] == "01" for fields in map(str.split, lines)
        )

    async def figures(self) -> dict[str, float]:
        """Running and waiting requests, from /metrics."""
        async with self.client(address=BYSTANDER, tenant=-1) as client:
            text = (await client.get("/metrics")).text
        found = dict(re.findall(r"^csm_(batch_occupancy|queue_length) (\S+)$", text, re.M))
        return {name: float(value) for name, value in found.items()}

    async def wait_until_idle(self, seconds: float) -> dict[str, float]:
        """Waits until no request is running, at most `seconds`; returns the figures."""
        deadline = time.monotonic() + seconds
        while any((figures := await self.figures()).values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
        return figures

    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace") if self.home else ""


def check_loopback(url: str) -> None:
    """Raises `ValueError` unless the host of a URL is an address of this machine."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        # Only IPv4: the attacker and the bystander use addresses of 127.0.0.0/8.
        is_own = ipaddress.IPv4Address(host).is_loopback
        if is_own and urlsplit(url).scheme == "http":
            return
    raise ValueError(
        f"{url} is not http://127.0.0.1:PORT: only a server of this machine is attacked"
    )


@contextlib.contextmanager
def start(home: Path, *more: str, num_keys: int = 0, wait: bool = True) -> Iterator[Target]:
    """Runs a server with the demo checkpoint and its directories below `home`."""
    home.mkdir()
    (home / "secret.txt").write_text(SECRET)
    voices = home / "voices"
    voices.mkdir()
    for path in _demo_prompts():
        if path.stem == "slt":
            (voices / f"{HOUSE_VOICE}{path.suffix}").write_bytes(path.read_bytes())
    port = _free_port()
    flags = [f"--port={port}", f"--data={home / 'data'}", f"--voices={voices}", *more]
    keys = [f"attack-key-{number}-{os.urandom(8).hex()}" for number in range(num_keys)]
    if keys:
        (home / "keys.txt").write_text("\n".join(keys) + "\n")
        flags.append(f"--api_keys_file={home / 'keys.txt'}")
    command = [sys.executable, "-m", "csm_jax.serve", "--checkpoint=demo", *flags]
    environment = os.environ | {"CSM_JAX_WEBHOOK_SECRET": SECRET}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    # This program has raised its own limit; a server starts with the usual one.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (min(_USUAL_FILES, hard), hard))
    target = Target(f"http://127.0.0.1:{port}", process.pid, keys, home, process)
    try:
        _wait_until_up(target, "/readyz" if wait else "/healthz")
        yield target
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)


def _demo_prompts() -> list[Path]:
    package = importlib.util.find_spec("csm_jax").origin
    return sorted((Path(package).parent / "loading" / "demo" / "prompts").iterdir())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def _wait_until_up(target: Target, path: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(target.url + path, timeout=5).status_code == 200:
                return
        if time.monotonic() > deadline or target.process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{target.log()[-2000:]}")
        time.sleep(0.5)


def count_statuses(statuses: list[int | str]) -> str:
    """The statuses with the number of their occurrences."""
    return ", ".join(f"{kind}: {statuses.count(kind)}" for kind in sorted(set(statuses)))


async def add_voice(
    client: httpx.AsyncClient,
    name: str,
    audio: bytes,
    text: str = "one",
    file_name: str = "a.flac",
) -> httpx.Response:
    """Uploads a recording as a voice."""
    form = {"name": name, "text": text, "speaker": "0"}
    return await client.post("/v1/audio/voices", data=form, files={"audio": (file_name, audio)})


@contextlib.asynccontextmanager
async def closing(writers: list[asyncio.StreamWriter]) -> AsyncIterator[None]:
    """Closes connections at the end, also after an error."""
    try:
        yield
    finally:
        for writer in writers:
            writer.transport.abort()
