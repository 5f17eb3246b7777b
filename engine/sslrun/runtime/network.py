"""Through which of this machine's networks another machine is reached. Linux only; elsewhere nothing is found."""

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

_ADDRESS_OF = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
LOOPBACK = "127.0.0.1"


def own_address(other: str) -> str:
    """The address of this machine from which it sends to another; empty if there is no way, or no such name."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def is_own(host: str) -> bool:
    """Whether a name or an address is of this machine."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(target)
            return True
    except OSError:
        return False


def interface_for(own: str, others: Iterable[str]) -> str | None:
    """The network interface, such as "eth0", through which ranks can reach this one; None if none can be found.

    gloo would take the one of the host's name, which often is a loopback address (Debian's 127.0.1.1).

    Args:
        own: this rank's address towards rank 0. On rank 0's machine it may be a loopback address.
        others: those of all ranks.
    """
    if _is_loopback(own):
        own = next((own_address(other) for other in others if other and not _is_loopback(other)), own)
    return _interface_with(own) if own else None


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _interface_with(address: str) -> str | None:
    if _is_loopback(address):
        return "lo"
    if ":" in address:
        wanted = ipaddress.ip_address(address.partition("%")[0]).packed.hex()
        with contextlib.suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                found, *_, name = line.split()
                if found == wanted:
                    return name
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(probe, _ADDRESS_OF, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
