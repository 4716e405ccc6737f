"""Reverse proxies whose word for a client's address and scheme is taken."""

import ipaddress
from collections.abc import Sequence


def check_proxies(proxies: Sequence[str]) -> None:
    """Raises `ValueError` for what is neither an address nor a network.

    uvicorn would take it for a name that no connection ever has.
    """
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise ValueError(f"{proxy[:100]!r} is no address and no network") from error


def is_proxy(host: str, proxies: Sequence[str]) -> bool:
    """Whether connections from this address are those of a trusted proxy."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return any(address in ipaddress.ip_network(proxy) for proxy in proxies)
