"""The attacks by name, and the kind of server of each."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

from attacks.target import Target


class Server(Enum):
    """The kind of server that an attack is for."""

    OPEN = "without keys"
    KEYS = "with keys of several tenants"
    LIMITED = "with --requests_per_minute=60"
    OWN = "of its own, which does not survive it"


@dataclass(frozen=True)
class Attack:
    """A registered attack.

    Attributes:
      tried: one line for the report.
      run: returns the result as text; raises `BrokeError` if the attack succeeded.
      floods: whether it overloads the server, so that the bystander's measurements count.
    """

    name: str
    tried: str
    run: Callable[[Target], Awaitable[str]]
    server: Server
    floods: bool


ATTACKS: list[Attack] = []


def attack(server: Server = Server.OPEN, floods: bool = True) -> Callable:
    """Registers a coroutine function under its name; its docstring is the description."""

    def register(function: Callable[[Target], Awaitable[str]]) -> Callable:
        name, tried = function.__name__, " ".join(function.__doc__.split())
        ATTACKS.append(Attack(name, tried, function, server, floods))
        return function

    return register
