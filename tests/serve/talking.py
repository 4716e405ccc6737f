"""The client of a conversation over a WebSocket."""

import json

import numpy as np
import pytest


class Talk:
    """The client of one conversation, which records the speech."""

    def __init__(self, socket):
        self.socket = socket

    def send(self, kind: str, **fields) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def receive(self):
        message = self.socket.recv(timeout=60)
        return message if isinstance(message, bytes) else json.loads(message)

    def ask(self, kind: str, **fields) -> dict:
        self.send(kind, **fields)
        return self.receive()

    def listen(self) -> tuple[dict, np.ndarray, dict]:
        """Receives one utterance: its first message, its samples, its last message."""
        started, pieces = self.receive(), []
        assert started["type"] == "started", started
        while isinstance(message := self.receive(), bytes):
            pieces.append(message)
        assert message["type"] == "done"
        audio = np.frombuffer(b"".join(pieces), "<i2").astype(np.float32) / 32768
        assert message["seconds"] == pytest.approx(len(audio) / 24_000, abs=1e-3)
        return started, audio, message
