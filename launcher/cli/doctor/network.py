"""The network interface over which processes meet: gloo finds it by the host's name or GLOO_SOCKET_IFNAME."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from launcher.agent.interface import check_loopback
from launcher.base.errors import UserError
from launcher.cli.doctor.findings import ERROR, OK, WARNING, Finding
from launcher.config.settings import RunConfig


def interfaces(config: RunConfig) -> Iterator[Finding]:
    there = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        given = os.environ.get(variable)
        if not given:
            continue
        exact = [name.lstrip("=^").partition(":")[0] for name in given.split(",")]
        unknown = [n for n in exact if not any(t == n or (variable[0] == "N" and t.startswith(n)) for t in there)]
        if unknown and not given.startswith("^"):
            yield Finding("network", ERROR, f"{variable}={given}: there is no such interface here ({', '.join(there)})",
                          f"export {variable}={_likely(there)}")  # fmt: skip
        else:
            yield Finding("network", OK, f"{variable}={given}")
    try:
        check_loopback()
    except UserError as error:
        yield Finding("network", ERROR, str(error), "ip link set lo up")
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        yield Finding("network", WARNING, f"this host's name {name} cannot be resolved ({error.strerror}): gloo may "
                      "not find its interface", f"echo '127.0.1.1 {name}' >> /etc/hosts, or export GLOO_SOCKET_IFNAME="
                      f"{_likely(there)}")  # fmt: skip
        return
    others_are_here = str(config.launch.main_process_ip).startswith("127.")
    is_hidden = address.startswith("127.") and not os.environ.get("GLOO_SOCKET_IFNAME")
    if config.launch.num_machines > 1 and is_hidden and not others_are_here:
        yield Finding("network", ERROR, f"this host's name {name} means {address}, which other machines cannot reach",
                      f"export GLOO_SOCKET_IFNAME={_likely(there)}")  # fmt: skip
    else:
        yield Finding("network", OK, f"{name} is {address}; interfaces: {', '.join(there)}")


def _likely(names: list[str]) -> str:
    return next((n for n in names if n != "lo" and not n.startswith(("docker", "veth", "br-", "virbr"))), "lo")
