"""The attacks by name, and on which server each is run."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

from attacks.target import Target


class Server(Enum):
    """How the server is started that an attack is for."""

    OPEN = "without keys"
    KEYS = "with keys of several tenants"
    LIMITED = "with --requests_per_minute=60"
    OWN = "of its own, which does not survive it"


@dataclass(frozen=True)
class Attack:
    """A way to harm a server, as it is registered.

    Attributes:
      tried: one line for the report.
      run: returns what happened; raises `BrokeError` if the attack succeeded.
      floods: whether it uses the server up, so that the bystander's experience counts.
    """

    name: str
    tried: str
    run: Callable[[Target], Awaitable[str]]
    server: Server
    floods: bool


ATTACKS: list[Attack] = []


def attack(server: Server = Server.OPEN, floods: bool = True) -> Callable:
    """Registers a coroutine function under its name; its docstring says what is tried."""

    def register(function: Callable[[Target], Awaitable[str]]) -> Callable:
        name, tried = function.__name__, " ".join(function.__doc__.split())
        ATTACKS.append(Attack(name, tried, function, server, floods))
        return function

    return register
