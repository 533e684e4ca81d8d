"""Headers of safetensors files that are not what they should be are refused, as the safetensors library does."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors

from launcher.base.errors import DamagedCheckpointError
from launcher.checkpoint import headers
from launcher.checkpoint.headers import read_places, read_state_index


def _entry(start: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **more}


def _file(header: Any, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_ENTRY = json.dumps(_entry()).encode()
_GOOD = {
    "one": _file({"a": _entry()}),
    "padded": _file(json.dumps({"a": _entry()}).encode() + b"   "),
    "metadata": _file({"__metadata__": {"format": "pt"}, "a": _entry()}),
    "none": _file({}, b""),
    "zero elements": _file({"a": _entry(0, 0, [0, 3]), "b": _entry()}),
    "scalar": _file({"a": _entry(0, 4, [])}, b"\0" * 4),
    "any order": _file({"b": _entry(8, 16), "a": _entry()}, b"\0" * 16),
}
_BAD = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "length beyond the file": struct.pack("<Q", 100) + b"{}",
    "length of 2**63": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": _file(b"{what"),
    "not UTF-8": _file(b'{"\xff": ' + _ENTRY + b"}"),
    "a list": _file([1, 2]),
    "brackets": _file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a string as entry": _file({"a": "b"}),
    "no dtype": _file({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "unknown dtype": _file({"a": _entry(dtype="F31")}),
    "dtype is a number": _file({"a": _entry(dtype=4)}),
    "wrong dtype": _file({"a": _entry(dtype="BF16")}),
    "wrong shape": _file({"a": _entry(shape=[3])}),
    "negative shape": _file({"a": _entry(shape=[-1, -2])}),
    "fraction": _file({"a": _entry(shape=[2.0])}),
    "true as a number": _file({"a": _entry(0, 4, [True])}, b"\0" * 4),
    "huge shape": _file({"a": _entry(shape=[2**40, 2**40])}),
    "infinity": _file(b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}'),
    "negative offset": _file({"a": _entry(-8, 0)}),
    "end before start": _file({"a": _entry(8, 0)}),
    "three offsets": _file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}),
    "offsets beyond the file": _file({"a": _entry(0, 16, [4])}),
    "overlap": _file({"a": _entry(), "b": _entry(4, 12)}, b"\0" * 12),
    "the same bytes twice": _file({"a": _entry(), "b": _entry()}),
    "a gap": _file({"a": _entry(), "b": _entry(12, 20)}, b"\0" * 20),
    "bytes left over": _file({"a": _entry()}, b"\0" * 9),
    "bytes missing": _file({"a": _entry()}, b"\0" * 7),
    "data but no tensor": _file({}),
    "metadata is a list": _file({"__metadata__": [1], "a": _entry()}),
    "metadata holds a number": _file({"__metadata__": {"a": 1}, "a": _entry()}),
}
_STRICTER = {
    "leading space": _file(b" {}", b""),  # the format says that it must begin with {
    "a name twice": _file(b'{"a": ' + _ENTRY + b', "a": ' + _ENTRY + b"}"),
    "a key twice": _file(b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 8]}}'),
    "an unknown key": _file({"a": _entry(strides=[0])}),
}


def _library_reads(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "np") as file:
            list(file.keys())
    except (safetensors.SafetensorError, OSError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", _GOOD)
def test_header_is_read_when_the_library_reads_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(_GOOD[name])
    assert _library_reads(path)
    places = read_places(path)
    data_start = 8 + struct.unpack("<Q", _GOOD[name][:8])[0]
    assert all(data_start <= p.offset and p.offset + p.spec.num_bytes <= len(_GOOD[name]) for p in places.values())


@pytest.mark.parametrize("name", [*_BAD, *_STRICTER])
def test_header_is_refused_when_it_is_malformed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes((_BAD | _STRICTER)[name])
    with pytest.raises(DamagedCheckpointError, match=r"file\.safetensors is not a whole safetensors file"):
        read_places(path)
    if name in _BAD:
        assert not _library_reads(path)


def test_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", headers.MAX_HEADER_BYTES + 1))
        file.truncate(2**40)  # no such memory
    started = time.process_time()
    with pytest.raises(DamagedCheckpointError, match="at most"):
        read_places(path)
    assert time.process_time() - started < 0.5


def test_pipe_is_refused_when_a_file_is_expected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file.safetensors")
    with pytest.raises(DamagedCheckpointError, match="is a pipe where a file should be"):
        read_places(tmp_path / "file.safetensors")


_PARTITION = {"num_rows": 1, "slots": {"exp_avg": "F32"}, "columns": {"w": [[2], 0, 2]}}
_MAP = {"exp_avg.p.00000": "optimizer.safetensors"}


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": []},
        {"weight_map": {"a": "../elsewhere"}},
        {"weight_map": {"a": 1}},
        {"weight_map": {}, "partitions": {"p": _PARTITION}},
        {"weight_map": _MAP, "partitions": {"p": {**_PARTITION, "num_rows": 10**12}}},
        {"weight_map": _MAP, "partitions": {"p": {**_PARTITION, "num_rows": -1}}},
        {"weight_map": _MAP, "partitions": {"p": {**_PARTITION, "slots": {"exp_avg": "F31"}}}},
        {"weight_map": _MAP, "partitions": {"p": {**_PARTITION, "columns": {"w": [[2], 0, 1]}}}},
        {"weight_map": _MAP, "partitions": {"p": {**_PARTITION, "columns": {"w": [[2], -4, 2]}}}},
        {"weight_map": _MAP, "partitions": {"p": {**_PARTITION, "columns": {"w": 3}}}},
        {"weight_map": _MAP, "partitions": [1]},
    ],
)
def test_index_is_refused_when_it_is_malformed(tmp_path: Path, index: Any) -> None:
    path = tmp_path / "optimizer.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": _MAP, "partitions": {"p": _PARTITION}}))
    assert read_state_index(path).partitions[0].columns["w"].numel == 2
    path.write_text(json.dumps(index))
    with pytest.raises(DamagedCheckpointError, match=r"index\.json cannot be read"):
        read_state_index(path)
