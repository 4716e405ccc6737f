"""The speech of earlier responses of a conversation, which later requests refer to by its id."""

import secrets
import time
from dataclasses import dataclass

import numpy as np

KEPT_SECONDS = 3600.0
# Frames of 80 ms, of 64 bytes each: 2 h of speech for an owner, and 20 h for all together.
MAX_FRAMES_OF_OWNER = 90_000
MAX_FRAMES = 900_000
# What a turn counts at least, since it has a text too.
_LEAST_FRAMES = 25
_ID_BYTES = 18


@dataclass(frozen=True)
class SpokenTurn:
    """A text that was spoken, and its speech.

    Attributes:
      owner: the only one who can refer to it.
      written: the text of the message.
      text: that was spoken, which a normalizer may have changed.
      codes: int16 [num_frames, Q].
      expires_at: until when it is kept, in seconds of Unix time, unless room is needed.
    """

    owner: str
    written: str
    text: str
    codes: np.ndarray
    expires_at: int

    @property
    def num_frames(self) -> int:
        """The frames that it counts for the limits."""
        return max(_LEAST_FRAMES, len(self.codes))


class SpokenTurns:
    """The newest turns of each owner, in memory. Not thread-safe: it is used in the event loop."""

    def __init__(self, max_frames: int = MAX_FRAMES, owner_frames: int = MAX_FRAMES_OF_OWNER):
        """Keeps no more than so many frames, of all owners together and of one."""
        self._max_frames = max_frames
        self._owner_frames = owner_frames
        # Oldest first.
        self._turns: dict[str, SpokenTurn] = {}

    @staticmethod
    def new_id() -> str:
        """An id that cannot be guessed."""
        return f"audio_{secrets.token_hex(_ID_BYTES)}"

    def add(
        self, turn_id: str, owner: str, written: str, text: str, codes: np.ndarray
    ) -> SpokenTurn:
        """Keeps a turn, and drops those that have expired or leave no room for it."""
        expires_at = int(time.time() + KEPT_SECONDS)
        turn = SpokenTurn(owner, written, text, codes.astype(np.int16), expires_at)
        self._turns[turn_id] = turn
        self._expire()
        self._make_room(
            [each for each in self._turns if self._turns[each].owner == owner], self._owner_frames
        )
        self._make_room(list(self._turns), self._max_frames)
        return turn

    def find(self, turn_id: str, owner: str) -> SpokenTurn | None:
        """The turn of an id, if it is the owner's and still kept."""
        self._expire()
        turn = self._turns.get(turn_id)
        return turn if turn is not None and turn.owner == owner else None

    def _expire(self) -> None:
        now = time.time()
        # They expire in the order in which they were added.
        while self._turns and next(iter(self._turns.values())).expires_at <= now:
            del self._turns[next(iter(self._turns))]

    def _make_room(self, ids: list[str], most: int) -> None:
        """Drops the first of these turns until the others have at most `most` frames."""
        total = sum(self._turns[each].num_frames for each in ids)
        for each in ids:
            if total <= most:
                return
            total -= self._turns.pop(each).num_frames
