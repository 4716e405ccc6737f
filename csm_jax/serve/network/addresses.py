"""IP addresses of clients and proxies."""

import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_address(text: str) -> Address | None:
    """Parses an IP address, ignoring the zone of IPv6; None if it is not one."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def network_of(host: str) -> str:
    """The addresses of one client as a text: an IPv4 address, or the /64 of an IPv6 address."""
    address = parse_address(host)
    if address is None:
        return host[:64]
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def check_proxies(proxies: Sequence[str]) -> None:
    """Raises `ValueError` for a text that is neither an address nor a network.

    uvicorn would accept it as a name, which no connection ever has.
    """
    for proxy in proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise ValueError(f"{proxy[:100]!r} is neither an address nor a network") from error


def is_proxy(host: str, proxies: Sequence[str]) -> bool:
    """Whether an address is that of a trusted proxy."""
    address = parse_address(host)
    return address is not None and any(address in ipaddress.ip_network(each) for each in proxies)
