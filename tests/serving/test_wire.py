"""Frames: the same as openpi's, and nothing that a stranger sends does harm."""

from __future__ import annotations

import contextlib
import pickle
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqap.errors import InputError
from sqap.serving.wire import DTYPES, MAX_CONTAINERS, pack, unpack

ARRAY = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}


def array(**changes: object) -> bytes:
    """A frame with one array, of which some keys are others."""
    changed = {key.encode(): value for key, value in changes.items()}
    return msgpack.packb({"x": {k: v for k, v in (ARRAY | changed).items() if v is not None}})


numbers = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: st.lists(st.integers(1, 4), max_size=3).map(
        lambda shape: np.random.default_rng(0).integers(0, 2, shape).astype(name)
    )
)
integers = st.integers(-(2**63), 2**64 - 1)
values = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text() | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(st.dictionaries(st.text(), values, max_size=4))
def test_what_is_packed_is_unpacked(message):
    assert same(unpack(pack(message)), message)


def test_frames_are_those_of_openpis_client():
    openpi = pytest.importorskip("openpi_client.msgpack_numpy")
    message = {
        "observation/image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
        "observation/state": np.array([1.5, -2], dtype=np.float32),
        "prompt": "open the drawer",
        "scale": np.float32(0.5),
        "flags": [True, None, 3],
    }
    assert pack(message) == openpi.packb(message)
    found = unpack(openpi.packb(message))
    assert same(found, message | {"scale": 0.5})


def test_arrays_in_another_order_of_bytes_or_of_memory_are_sent_as_they_are_read():
    for value in (np.arange(6.0, dtype=">f8"), np.arange(6.0).reshape(2, 3).T, np.float64(2)):
        assert same(unpack(pack({"x": value})), {"x": np.asarray(value, "<f8") if value.shape else 2.0})


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["a"]), np.array([1j]), object(), {1, 2}])
def test_what_cannot_be_sent_is_said(value):
    with pytest.raises(InputError, match="cannot be sent as MessagePack: it holds a"):
        pack({"x": value})


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        (b"", "not valid MessagePack"),
        (b"\xc1", "a byte begins no value"),
        (pack({"prompt": "x"})[:-1], "incomplete input"),
        (pack({"prompt": "x"}) + b"\0", "extra data"),
        (b"\x91" * 5000, "nested too deeply"),
        (b"\x81\xa1\xff\x01", "can't decode byte 0xff"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\x81\xa1x\xc6\x7f\xff\xff\xff", "MessagePack"),
        (b"\x81\xa1x\xdb\x7f\xff\xff\xff", "MessagePack"),
        (pickle.dumps({"prompt": "x"}), "MessagePack"),
        (b"\x01", "must be one map, got int"),
        (msgpack.packb([{}]), "must be one map, got list"),
        (msgpack.packb(ARRAY), "must be one map, got ndarray"),
        (msgpack.packb({b"x": 1}), "keys of a map must be strings, got b'x'"),
        (b"\x81\x01\x02", "int is not allowed for map key"),
        (b"\x82\xa1a\x01\xa1a\x02", "has a key twice"),
        (msgpack.packb({"x": msgpack.ExtType(5, b"")}), "extension type 5"),
        (msgpack.packb({"x": msgpack.Timestamp(1)}), "extension type -1"),
        (msgpack.packb([msgpack.Timestamp(1)]), "extension type -1"),
        (array(dtype="|O"), "dtype must be one of"),
        (array(dtype="O"), "dtype must be one of"),
        (array(dtype="<U4"), "dtype must be one of"),
        (array(dtype=">f4"), "dtype must be one of"),
        (array(dtype="f4,f4"), "dtype must be one of"),
        (array(dtype=["<f4"]), "dtype must be one of"),
        (array(shape=[3]), r"shape \(3,\) and type float32 has 12 bytes, got 8"),
        (array(shape=[-2]), "list of up to 8 positive lengths"),
        (array(shape=[0, 2**62], data=b""), "list of up to 8 positive lengths"),
        (array(shape=[2**62, 4]), "bytes, got 8"),
        (array(shape=[True, 2]), "positive lengths"),
        (array(shape=[1] * 9 + [2]), "positive lengths"),
        (array(shape=2), "positive lengths"),
        (array(data="text"), "data must be bytes, got str"),
        (array(data=None), "keys data, dtype and shape, got b'dtype', b'shape'"),
        (array(more=1), "keys data, dtype and shape"),
        (msgpack.packb({"x": {b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}}), "must be a number"),
        (msgpack.packb({"x": {b"__npgeneric__": True, b"data": 1, b"dtype": "O"}}), "dtype must be one of"),
        (msgpack.packb({"x": {b"__npgeneric__": True}}), "keys data and dtype, got none"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_one_sentence(frame, sentence):
    with pytest.raises(InputError, match=sentence):
        unpack(frame)


def test_a_small_frame_of_many_objects_takes_no_memory():
    lists = b"\xdc\x00\x64" + b"\x90" * 100
    frame = b"\x81\xa1x" + b"\xdc\x00\x64" + (b"\xdc\x00\x64" + lists * 100) * 100
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"more than {MAX_CONTAINERS} maps and lists"):
            unpack(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(frame) > 1e6
    assert peak < len(frame) / 2


mutations = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "double"]), st.integers(0, 400), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


@given(mutations)
def test_whatever_comes_is_a_message_or_a_sentence(changes):
    frame = bytearray(
        pack({"images": {"a": np.zeros((4, 4, 3), np.uint8)}, "prompt": "go", "seed": 1, "list": [1, 2.0]})
    )
    for kind, at, value in changes:
        at %= max(len(frame), 1)
        if kind == "set" and frame:
            frame[at] = value
        elif kind == "cut":
            del frame[at : at + value % 8]
        elif kind == "insert":
            frame.insert(at, value)
        else:
            frame[at:at] = frame[at : at + 16]
    check_decoder(bytes(frame))


@given(st.binary(max_size=300))
def test_random_bytes_are_a_message_or_a_sentence(frame):
    check_decoder(frame)


def check_decoder(frame: bytes) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(unpack(frame), dict)
