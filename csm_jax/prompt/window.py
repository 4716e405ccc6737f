"""Which turns are kept when there is no room for all: those that fix a voice, and the newest.

The first turn of a speaker is whose voice the others continue. Without it, a voice that goes on for
minutes has only its own echo to follow, and drifts away. So it is pinned: it stays when newer turns
are left out.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from csm_jax.prompt.turns import Turn


class Pinnable(Protocol):
    """What decides whether a turn is pinned."""

    @property
    def speaker(self) -> int: ...

    @property
    def pinned(self) -> bool: ...

    @property
    def has_sound(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class ContextTurn:
    """A turn that can be context of a part of a request.

    Attributes:
      number: its number in the context of the request, from 1; 0 is a part that was spoken.
      is_pinned: whether it fixes the voice of its speaker.
    """

    turn: Turn
    number: int
    is_pinned: bool


def find_pinned(
    turns: Sequence[Pinnable], num_shared: int = 0, has_voice: Collection[int] = ()
) -> frozenset[int]:
    """The indices of the turns that fix the voices of their speakers.

    They are the turns that a caller has pinned, and of every other speaker the first with sound.

    Args:
      num_shared: so many of the first turns are pinned.
      has_voice: speakers whose voice is fixed by other turns.
    """
    pinned = {i for i, turn in enumerate(turns) if turn.pinned or i < num_shared}
    known = {*has_voice, *(turns[i].speaker for i in pinned)}
    for index, turn in enumerate(turns):
        if turn.has_sound and turn.speaker not in known:
            known.add(turn.speaker)
            pinned.add(index)
    return frozenset(pinned)


def find_newest(
    turns: Sequence[Pinnable],
    most: int,
    lengths: Sequence[int] | None = None,
    room: float = math.inf,
) -> list[int]:
    """The indices of the turns that are remembered for those to come, in their order.

    They are the newest turn, the pinned turns, and the newest others. Of more than `most`, half may
    be pinned turns, the newest of these.

    Args:
      lengths: positions of the turns; None if they do not matter.
      room: positions of the pinned turns, and as many of the others.
    """
    pinned = find_pinned(turns)
    kept: set[int] = set()
    most_pinned = max(most // 2, most - (len(turns) - len(pinned)))
    for is_pinned, limit in ((True, most_pinned), (False, most)):
        left = room
        for index in _newest_first(turns):
            if (index in pinned) != is_pinned:
                continue
            left -= lengths[index] if lengths else 0
            is_last = index == len(turns) - 1
            if not is_last and (left < 0 or len(kept) >= limit):
                break
            kept.add(index)
    return sorted(kept)


def choose_context(
    turns: Sequence[ContextTurn], speaker: int, room: int, num_frames: float
) -> list[ContextTurn]:
    """The turns that are the context of a part if not all can be, in their order.

    They are chosen in this order, as far as there is room: pinned turns of its speaker; the newest
    turns, without a gap, until they have enough speech; pinned turns of other speakers.

    Args:
      speaker: of the part.
      room: positions.
      num_frames: of the speech that is enough.
    """
    pinned = [i for i in _newest_first(turns) if turns[i].is_pinned]
    selection = _Selection(turns, room)
    for index in pinned:
        if turns[index].turn.speaker == speaker:
            selection.add(index)
    newest = 0
    for index in _newest_first(turns):
        if newest >= num_frames or not selection.add(index):
            break
        newest += turns[index].turn.num_frames
    for index in pinned:
        selection.add(index)
    return [turn for index, turn in enumerate(turns) if index in selection.kept]


class _Selection:
    """Some turns, as many as fit."""

    def __init__(self, turns: Sequence[ContextTurn], room: int):
        self.kept: set[int] = set()
        self._turns = turns
        self._room = room

    def add(self, index: int) -> bool:
        """Adds a turn if it fits; returns whether it is one of the selection."""
        if index not in self.kept and self._turns[index].turn.length <= self._room:
            self.kept.add(index)
            self._room -= self._turns[index].turn.length
        return index in self.kept


def fits(turns: Sequence[ContextTurn], room: int) -> bool:
    """Whether all turns fit; none is tokenized beyond the room."""
    for index in _newest_first(turns):
        room -= turns[index].turn.length
        if room < 0:
            return False
    return True


def _newest_first(turns: Sequence[object]) -> Iterator[int]:
    return reversed(range(len(turns)))
