"""The caller of a request: the owner of its stored data, and its share of the engine."""

from dataclasses import dataclass

from starlette.requests import HTTPConnection

_SCOPE_KEY = "csm_jax.caller"


@dataclass(frozen=True)
class Caller:
    """The sender of a request, as the authentication middleware has identified it.

    Attributes:
      owner: owns what is stored for this request. Without API keys it is "" for all callers
        (one tenant). With keys it is the tenant that the keys file names, or a digest of the key.
      share: requests of one share are counted together for rates, permits and slots of the batch.
        It is the owner where there are keys, else the client's address (its /64 for IPv6).
      weight: the size of that share, compared with others.
    """

    owner: str = ""
    share: str = ""
    weight: float = 1.0

    @classmethod
    def without_key(cls, share: str) -> "Caller":
        """A caller that sends no key to a server with keys, for what is open to all."""
        return cls(_NO_OWNER, share)

    @property
    def has_no_key(self) -> bool:
        """Whether the server has keys, and this caller sent none."""
        return self.owner == _NO_OWNER


# Owns nothing: no tenant and no digest of a key is called so.
_NO_OWNER = "-"
# The server's own requests, such as those that warm it up.
INTERNAL = Caller()


def set_caller(connection: HTTPConnection, caller: Caller) -> None:
    """Attaches the caller to a request or WebSocket. Only the authentication middleware does."""
    connection.scope[_SCOPE_KEY] = caller


def caller_of(connection: HTTPConnection) -> Caller:
    """The caller of a request or WebSocket; `INTERNAL` if no middleware has set one."""
    return connection.scope.get(_SCOPE_KEY, INTERNAL)
