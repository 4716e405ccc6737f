"""Addresses of clients: which one a client is known by, and which are those of trusted proxies."""

import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_address(text: str) -> Address | None:
    """The IP address of a text, without the zone that IPv6 can have; None if it is none."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def network_of(host: str) -> str:
    """The addresses that one client has: an IPv4 address, or the /64 of an IPv6 address."""
    address = parse_address(host)
    if address is None:
        return host[:64]
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


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
    address = parse_address(host)
    return address is not None and any(address in ipaddress.ip_network(each) for each in proxies)
