"""What comes in at the port of the first machine may be from anybody."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from launcher.agent.channel import Channel


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b"7\n", b"null\n", b'{"kind": 7}\n', b"\xff\xfe\n", b"[" * 60_000 + b"\n",
        b'{"a":' * 9_000 + b"\n", b"\n", b'{"kind": "\\ud800"}\n', b"1" * 10_000 + b"\n",
    ],
)  # fmt: skip
def test_a_connection_is_lost_when_it_brings_nonsense(pair: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
    theirs.sendall(data)
    assert channel.receive() == [] and channel.is_lost


def test_an_agents_report_may_be_long(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, theirs = pair
    channel.trust()
    theirs.setblocking(False)
    line, sent = b'{"kind": "ended", "text": "' + b"x" * 300_000 + b'"}\n', 0
    found = []
    while sent < len(line):
        sent += theirs.send(line[sent : sent + 50_000])
        found += channel.receive()
    assert len(found) == 1 and not channel.is_lost


def test_a_stranger_is_cut_off_when_its_line_has_no_end(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.setblocking(False)
    for _ in range(10):
        if channel.is_lost:
            break
        theirs.send(b"x" * 20_000)
        assert channel.receive() == []
    assert channel.is_lost
