"""A middleware around a tiny application, called without a server."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from csm_jax.serve.admission.caller import caller_of


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Responds with the caller in its scope."""
    if scope["type"] == "websocket":
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        await socket.send_json(vars(caller_of(socket)))
        await socket.close()
        return
    request = Request(scope, receive)
    body = await request.body()
    response = {"caller": vars(caller_of(request)), "bytes": len(body), "client": scope["client"]}
    await JSONResponse(response)(scope, receive, send)


def ask(
    app: Callable, path: str = "/v1/models", method: str = "GET", client: str = "10.0.0.1", **more
) -> httpx.Response:
    """The response of an ASGI application."""

    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(client, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path, **more)

    return asyncio.run(work())


@dataclass
class Opened:
    """The result of opening a WebSocket: 101, or the status of the response instead."""

    status: int = 0
    subprotocol: str | None = None
    messages: list[Message] = field(default_factory=list)


def open_socket(
    app: Callable,
    path: str = "/v1/realtime",
    query: str = "",
    headers: dict[str, str] | None = None,
    subprotocols: tuple[str, ...] = (),
    client: str = "10.0.0.1",
) -> Opened:
    """Opens a WebSocket to an ASGI application."""
    named = {"host": "localhost", **(headers or {})}
    scope: dict[str, Any] = {
        "type": "websocket",
        "path": path,
        "query_string": query.encode(),
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in named.items()],
        "subprotocols": list(subprotocols),
        "client": (client, 1234),
        "server": ("127.0.0.1", 80),
        "scheme": "ws",
        "extensions": {"websocket.http.response": {}},
    }
    opened = Opened()

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        opened.messages.append(message)
        if message["type"] == "websocket.accept":
            opened.status, opened.subprotocol = 101, message.get("subprotocol")
        elif message["type"] == "websocket.http.response.start":
            opened.status = message["status"]

    asyncio.run(app(scope, receive, send))
    return opened
