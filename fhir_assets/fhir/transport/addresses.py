"""The network addresses that a server may make this machine connect to.

A server on the internet that names an address of the local network would otherwise read through this machine what only
this machine reaches: the metadata service of a cloud, or an internal service without a login. The address that is
connected to is the one that was checked, so that a name that resolves differently a moment later changes nothing.
"""

import socket
import time
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

_TRANSLATED = IPv6Network("64:ff9b::/96")
"""IPv4 addresses behind a NAT64 gateway (https://www.rfc-editor.org/rfc/rfc6052)."""

_LEAST_SECONDS = 0.001


class PrivateAddress(Exception):
    """A host has no other address than private ones, which are not connected to."""


def connect_publicly(host: str, port: int | None, timeout: float | None, *, own_host: str) -> socket.socket:
    """Connect to a host that a server named, and return the socket.

    An address of the local network, of this machine or of no network at all is skipped, unless ``own_host``, the
    server itself, has the same address. ``timeout`` holds for all addresses together, however many there are.
    Raises PrivateAddress if there is no other, and OSError.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    error: OSError | None = None
    own: set[str] | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError("not a host name") from None
    for family, kind, protocol, _, address in found:
        name = str(address[0])
        if not is_public(name):
            own = resolve(own_host) if own is None else own
            if name not in own:
                continue
        connection = socket.socket(family, kind, protocol)
        try:
            if deadline is not None:
                connection.settimeout(max(_LEAST_SECONDS, deadline - time.monotonic()))
            connection.connect(address)
        except OSError as reason:
            connection.close()
            error = reason
            if deadline is not None and time.monotonic() > deadline:
                break
        else:
            connection.settimeout(timeout)
            return connection
    raise error or PrivateAddress


def resolve(host: str) -> set[str]:
    """Return the addresses of a host; none if its name cannot be resolved."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return set()


def are_public(addresses: Iterable[str]) -> bool:
    """Return whether all addresses are public."""
    return all(is_public(address) for address in addresses)


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the internet. Addresses that contain another one count as that one."""
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address):
        return parsed.is_global and not parsed.is_multicast and all(map(_is_public_v4, _embedded(parsed)))
    return _is_public_v4(parsed)


def _embedded(address: IPv6Address) -> list[IPv4Address]:
    if address in _TRANSLATED:
        return [IPv4Address(int(address) & 0xFFFFFFFF)]
    teredo = address.teredo or ()
    return [inner for inner in (address.ipv4_mapped, address.sixtofour, *teredo) if inner is not None]


def _is_public_v4(address: IPv4Address) -> bool:
    return address.is_global and not address.is_multicast
