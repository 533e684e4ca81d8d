"""Over which network interface ranks talk: those of one machine, and of several."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping

from launcher.base.errors import UserError

_SIOCGIFADDR = 0x8915
"""ioctl of Linux: the IPv4 address of an interface, see netdevice(7)."""
_GLOO = "GLOO_SOCKET_IFNAME"


def check_loopback() -> None:
    """The ranks of one machine meet at 127.0.0.1, and would wait there for minutes; under ZeRO one alone does, too.

    Raises:
        UserError: nothing answers there, as in a network namespace that somebody made and left as it was.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5.0):
            pass
    except OSError as error:
        raise UserError(
            f"the processes of a run meet at 127.0.0.1, which cannot be reached here: {error}. Switch the loopback "
            "interface on (ip link set lo up), or train with launch.num_processes=1 strategy=single"
        ) from error


def interface_settings(main_address: str | None, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME, where gloo would take the loopback and no other machine could reach it.

    Gloo binds to what the machine's own name leads to (torch's ProcessGroupGloo::createDefaultDevice), and /etc/hosts
    of Debian and Ubuntu gives 127.0.1.1 for that. The right interface is the one that leads to the first machine.

    Args:
        main_address: launch.main_process_ip.
    """
    if main_address is None or env.get(_GLOO) or not _is_loopback(_address_of(socket.gethostname())):
        return {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((main_address, 9))  # sends nothing: the kernel only looks up the route
        except OSError:
            return {}
        own = probe.getsockname()[0]
        if _is_loopback(own):
            return {}
        name = next((name for _, name in socket.if_nameindex() if _interface_address(probe, name) == own), None)
    return {_GLOO: name} if name is not None else {}


def _address_of(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    return address is None or address.startswith("127.")


def _interface_address(probe: socket.socket, name: str) -> str | None:
    try:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:  # it has none
        return None
    return socket.inet_ntoa(answer[20:24])
