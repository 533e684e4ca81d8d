"""Which interface gloo is told to take, where the machine's own name leads to the loopback."""

from __future__ import annotations

import socket

import pytest

from launcher.agent import interface
from launcher.agent.interface import interface_settings


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            address = interface._interface_address(probe, name)
            if address is not None and not address.startswith("127."):
                return address
    pytest.skip("this machine has the loopback alone")


@pytest.mark.parametrize("name_leads_to", ["127.0.1.1", "127.0.0.1", None])
def test_gloo_takes_the_interface_to_the_first_machine_when_its_own_name_is_the_loopback(
    monkeypatch: pytest.MonkeyPatch, name_leads_to: str | None
) -> None:
    monkeypatch.setattr(interface, "_address_of", lambda name: name_leads_to)
    found = interface_settings(own_address(), {})
    assert found["GLOO_SOCKET_IFNAME"] in {name for _, name in socket.if_nameindex()}
    assert interface_settings(own_address(), {"GLOO_SOCKET_IFNAME": "ib0"}) == {}
    for address in ("127.0.0.1", "no-such-host.invalid", None):
        assert interface_settings(address, {}) == {}


def test_gloo_chooses_itself_when_the_own_name_leads_to_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_address_of", lambda name: "10.0.0.7")
    assert interface_settings(own_address(), {}) == {}
