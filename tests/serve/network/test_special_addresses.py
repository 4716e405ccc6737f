"""Public and special addresses, by the tables of IANA."""

import csv
import io
import ipaddress
import random

import pytest

from csm_jax.serve.network.special_addresses import is_public

# Rows of iana-ipv4-special-registry-1.csv and iana-ipv6-special-registry-1.csv: the block, its
# name, and whether it is globally reachable (a footnote where the registry has one).
REGISTRIES = """\
0.0.0.0/8,"This network",False
0.0.0.0/32,"This host on this network",False
10.0.0.0/8,Private-Use,False
100.64.0.0/10,Shared Address Space,False
127.0.0.0/8,Loopback,False [1]
169.254.0.0/16,Link Local,False
172.16.0.0/12,Private-Use,False
192.0.0.0/24,IETF Protocol Assignments,False [2]
192.0.0.0/29,IPv4 Service Continuity Prefix,False
192.0.0.8/32,IPv4 dummy address,False
192.0.0.9/32,Port Control Protocol Anycast,True
192.0.0.10/32,Traversal Using Relays around NAT Anycast,True
192.0.0.170/32,NAT64/DNS64 Discovery,False
192.0.0.171/32,NAT64/DNS64 Discovery,False
192.0.2.0/24,Documentation (TEST-NET-1),False
192.31.196.0/24,AS112-v4,True
192.52.193.0/24,AMT,True
192.88.99.0/24,Deprecated (6to4 Relay Anycast),N/A
192.88.99.2/32,6a44-relay anycast address,False
192.168.0.0/16,Private-Use,False
192.175.48.0/24,Direct Delegation AS112 Service,True
198.18.0.0/15,Benchmarking,False
198.51.100.0/24,Documentation (TEST-NET-2),False
203.0.113.0/24,Documentation (TEST-NET-3),False
240.0.0.0/4,Reserved,False
255.255.255.255/32,Limited Broadcast,False
::1/128,Loopback Address,False
::/128,Unspecified Address,False
::ffff:0:0/96,IPv4-mapped Address,False
64:ff9b:1::/48,IPv4-IPv6 Translat.,False
100::/64,Discard-Only Address Block,False
100:0:0:1::/64,Dummy IPv6 Prefix,False
2001::/23,IETF Protocol Assignments,False [1]
2001::/32,TEREDO,N/A [2]
2001:1::1/128,Port Control Protocol Anycast,True
2001:1::2/128,Traversal Using Relays around NAT Anycast,True
2001:1::3/128,DNS-SD Service Registration Protocol Anycast,True
2001:2::/48,Benchmarking,False
2001:3::/32,AMT,True
2001:4:112::/48,AS112-v6,True
2001:10::/28,Deprecated (previously ORCHID),N/A
2001:20::/28,ORCHIDv2,True
2001:30::/28,Drone Remote ID Protocol Entity Tags (DETs) Prefix,True
2001:db8::/32,Documentation,False
2002::/16,6to4,N/A [3]
2620:4f:8000::/48,Direct Delegation AS112 Service,True
3fff::/20,Documentation,False
5f00::/16,Segment Routing (SRv6) SIDs,False
fc00::/7,Unique-Local,False [4]
fe80::/10,Link-Local Unicast,False
"""
# From other registries: multicast, and the deprecated site-local addresses.
OTHERS = ["224.0.0.0/4", "ff00::/8", "fec0::/10", "::/96", "64:ff9b::7f00:0/104", "4000::/3"]
BLOCKS = [row[0] for row in csv.reader(io.StringIO(REGISTRIES))] + OTHERS


def ends_of(block: str) -> list:
    network = ipaddress.ip_network(block)
    middle = network[network.num_addresses // 2]
    return [network[0], middle, network[-1]]


@pytest.mark.parametrize("block", BLOCKS)
def test_no_special_address_is_public(block):
    assert not any(is_public(address) for address in ends_of(block))


@pytest.mark.parametrize(
    "address",
    ["192.0.0.192", "192.88.99.1", "3fff::1", "5f00::1", "0.1.2.3", "100.127.255.255", "fec0::1"],
)
def test_special_addresses_that_python_calls_global_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"],
)
def test_addresses_of_clouds_own_services_are_not_public(address):
    """Of AWS, Google and Azure; of AWS by IPv6; of Alibaba; of Oracle; of Azure's host."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.0", "172.32.0.0"),
        *("192.0.1.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "192.88.98.255"),
        *("2606:2800:220:1::", "2001:200::", "2001:4860:4860::8888", "2003::1", "3ffe::1"),
        "64:ff9b::808:808",
    ],
)
def test_other_addresses_are_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_addresses_that_python_calls_private_are_not_public():
    """Compares with Python's list on addresses of all kinds."""
    source = random.Random(0)
    seen = 0
    for _ in range(20_000):
        four = ipaddress.IPv4Address(source.getrandbits(32))
        six = ipaddress.IPv6Address(source.getrandbits(128) >> source.choice([0, 3, 64]))
        near = source.choice(BLOCKS)
        for address in (four, six, source.choice(ends_of(near))):
            if is_public(address):
                seen += 1
                assert not address.is_multicast
                assert address.is_global, address
    assert seen > 10_000
