"""All connections of clients: how many there may be, and what each of them waits for.

When a client has too many connections, the one that has waited longest for it makes room for a new
one.
"""

import asyncio
import enum
import itertools
from collections.abc import Sequence
from typing import Protocol

from csm_jax.serve.admission.memory import MemoryBudget
from csm_jax.serve.network.addresses import is_proxy, network_of
from csm_jax.serve.settings import Limits
from csm_jax.serve.transport.input_scheduler import InputScheduler

# Connections that are checked for sent responses when room is needed.
_NUM_CHECKED = 16


class Phase(enum.Enum):
    """The state of a connection. In all but the last two the server waits for the client.

    In `WRITING` the client must read the response at a minimum pace.
    """

    HEAD = "the head of a request is not complete"
    IDLE = "between two requests"
    BODY = "the body of a request is not complete"
    WRITING = "a response is complete, but not sent yet"
    BUSY = "a request is being answered"
    SOCKET = "a WebSocket"


class CountedConnection(Protocol):
    """A connection of a client.

    Attributes:
      phase, since: its state, and the event loop's time when that began.
      groups, share: the groups in which it is counted, and the client's share.
    """

    phase: Phase
    since: float
    groups: "list[ConnectionGroup]"
    share: str | None

    def update_phase(self) -> None:
        """Updates the phase if the response has been sent meanwhile."""

    def check(self, now: float) -> None:
        """Closes the connection if it has waited too long for the client."""

    def abort(self) -> None:
        """Closes the connection immediately."""


class ConnectionGroup:
    """Connections that are counted together.

    Attributes:
      size: how many there are.
      waiting: connections that wait for their clients, oldest first, by phase.
    """

    def __init__(self):
        self.size = 0
        self.waiting: dict[Phase, dict[CountedConnection, None]] = {
            phase: {} for phase in (Phase.HEAD, Phase.IDLE, Phase.BODY, Phase.WRITING)
        }

    def update(self, connection: CountedConnection, old: Phase | None, new: Phase | None) -> None:
        """Updates the phase of a connection; None is before its beginning and after its end."""
        self.size += (old is None) - (new is None)
        if old in self.waiting:
            del self.waiting[old][connection]
        if new in self.waiting:
            self.waiting[new][connection] = None

    def longest_waiting(self) -> CountedConnection | None:
        """The connection that makes room for a new one; those without a request come first."""
        # Connections whose responses have been sent meanwhile wait for their clients again.
        for connection in list(itertools.islice(self.waiting[Phase.WRITING], _NUM_CHECKED)):
            connection.update_phase()
        heads = [next(iter(self.waiting[phase]), None) for phase in (Phase.HEAD, Phase.IDLE)]
        found = [connection for connection in heads if connection]
        if found:
            return min(found, key=lambda connection: connection.since)
        return next(iter(self.waiting[Phase.BODY]), None)


class Connections:
    """All connections of a server, from the moment when they are accepted.

    Attributes:
      input: schedules the data that they have received.
      messages: counts the bytes of incomplete WebSocket messages.
    """

    def __init__(self, limits: Limits, proxies: Sequence[str] = ()):
        """Starts without connections.

        Args:
          proxies: addresses and networks of trusted proxies, which have many clients.
        """
        self.limits = limits
        self.input = InputScheduler()
        self.messages = MemoryBudget(limits.pending_body_bytes, "messages")
        self._proxies = proxies
        self._all: set[CountedConnection] = set()
        self._total = ConnectionGroup()
        self._groups: dict[str, ConnectionGroup] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, connection: CountedConnection) -> bool:
        return connection in self._all

    def admit(self, connection: CountedConnection, host: str) -> bool:
        """Admits a connection; if need be, one that waits for its client is closed for it."""
        groups = [self._total]
        if not is_proxy(host, self._proxies):
            connection.share = network_of(host)
            group = self._groups.get(connection.share) or ConnectionGroup()
            if not self._make_room(group, self.limits.connections_per_address):
                return False
            groups.append(group)
        if not self._make_room(self._total, self.limits.connections):
            return False
        if connection.share is not None:
            # It may have been removed together with the connection that made room.
            self._groups[connection.share] = groups[-1]
        connection.groups = groups
        self._all.add(connection)
        for group in connection.groups:
            group.update(connection, None, connection.phase)
        return True

    def _make_room(self, group: ConnectionGroup, limit: int) -> bool:
        if group.size < limit:
            return True
        if (longest := group.longest_waiting()) is None:
            return False
        longest.abort()
        self.remove(longest)
        return True

    def remove(self, connection: CountedConnection) -> None:
        """Removes a connection. A second call changes nothing."""
        if connection not in self._all:
            return
        self._all.remove(connection)
        for group in connection.groups:
            group.update(connection, connection.phase, None)
        share = connection.share
        if share is not None and (group := self._groups.get(share)) and not group.size:
            del self._groups[share]

    def update(self, connection: CountedConnection, old: Phase) -> None:
        """Updates the groups of a connection whose phase has changed."""
        if connection in self._all:
            for group in connection.groups:
                group.update(connection, old, connection.phase)

    def sweep(self) -> None:
        """Closes connections that have waited too long for their clients."""
        now = asyncio.get_running_loop().time()
        for connection in list(self._all):
            connection.check(now)

    def abort(self) -> None:
        """Closes all connections immediately."""
        for connection in list(self._all):
            connection.abort()
