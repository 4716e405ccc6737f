"""Networks that are not part of the public internet, from IANA's special-purpose registries.

Python's `ipaddress` has such a list too, but a different one in each version, and it calls some of
these networks global. Here all networks of the registries are refused, and all of IPv6 outside of
2000::/3. The one exception is the well-known prefix of NAT64, to which names resolve in networks
without IPv4: such an address is public if the IPv4 address inside it is.

https://www.iana.org/assignments/iana-ipv4-special-registry
https://www.iana.org/assignments/iana-ipv6-special-registry
https://www.iana.org/assignments/multicast-addresses
"""

import ipaddress

from csm_jax.serve.network.addresses import Address

_IPV4 = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24"),
    *("192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24"),
    *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    # Of no registry: in Azure each machine reaches its host by it, which hands out its settings.
    "168.63.129.16/32",
]
# All of 2001::/23 are protocols' own addresses; Teredo (2001::/32) and 6to4 (2002::/16) lead to
# IPv4 addresses by way of strangers.
_IPV6 = ["2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")

_NETWORKS = {
    4: [ipaddress.ip_network(network) for network in _IPV4],
    6: [ipaddress.ip_network(network) for network in _IPV6],
}


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet."""
    if address.version == 6 and address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address.version == 6 and address not in _GLOBAL_UNICAST:
        return False
    return not any(address in network for network in _NETWORKS[address.version])
