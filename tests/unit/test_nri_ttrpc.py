"""`nri.ttrpc` and `nri.mux`: frames of both layers, in pieces, hostile, and as the published engines read them."""

from __future__ import annotations

import contextlib
import itertools
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci_hook.errors import EngineUnsupported
from oci_hook.nri import mux, ttrpc
from oci_hook.nri.ttrpc import Frame, Request, Response
from tests import nri_engine

FRAMES = st.builds(
    Frame, st.integers(0, (1 << 32) - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=300)
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """The same bytes, cut at these places."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[first:last] for first, last in itertools.pairwise(places)]


# --- ttrpc ------------------------------------------------------------------------------------------------------------


def test_a_frame_is_its_length_stream_type_flags_and_data() -> None:
    data = ttrpc.encode_frame(Frame(5, ttrpc.Kind.RESPONSE, 1, b"four"))
    assert data == b"\x00\x00\x00\x04" + b"\x00\x00\x00\x05" + b"\x02\x01" + b"four"
    assert list(ttrpc.FrameReader().feed(data)) == [Frame(5, 2, 1, b"four")]


@given(st.lists(FRAMES, max_size=8), st.lists(st.integers(0, 4000), max_size=20))
def test_frames_come_out_whole_however_their_bytes_come_in(frames: list[Frame], cuts: list[int]) -> None:
    reader = ttrpc.FrameReader()
    found = [frame for piece in pieces(b"".join(map(ttrpc.encode_frame, frames)), cuts) for frame in reader.feed(piece)]
    assert found == frames


def test_the_longest_message_is_sent_and_a_longer_one_is_not() -> None:
    longest = Frame(1, 1, 0, bytes(4 << 20))
    data = ttrpc.encode_frame(longest)
    assert list(ttrpc.FrameReader().feed(data)) == [longest]
    with pytest.raises(EngineUnsupported, match="4194305 bytes"):
        ttrpc.encode_frame(Frame(1, 1, 0, bytes((4 << 20) + 1)))


def test_what_is_received_may_be_longer_than_what_is_sent() -> None:
    """Engines with NRI before 0.8 send what ttrpc does not allow."""
    size = 64 << 20
    reader = ttrpc.FrameReader()
    found = list(reader.feed(struct.pack(">IIBB", size, 1, 1, 0)))
    for _ in range(size >> 20):
        assert found == []
        found = list(reader.feed(bytes(1 << 20)))
    assert [(len(frame.data), frame.skipped_bytes) for frame in found] == [(size, 0)]


@given(st.integers(0, 700), st.lists(st.integers(0, 900), max_size=20))
def test_of_a_longer_frame_the_beginning_stays_and_the_next_one_is_found(size: int, cuts: list[int]) -> None:
    data, after = bytes(number % 251 for number in range(size)), Frame(9, 2, 0, b"after")
    reader = ttrpc.FrameReader(limit_bytes=300)
    sent = struct.pack(">IIBB", size, 7, 1, 2) + data + ttrpc.encode_frame(after)
    found = [frame for piece in pieces(sent, cuts) for frame in reader.feed(piece)]
    if size <= 300:
        assert found == [Frame(7, 1, 2, data), after]
    else:
        assert found == [Frame(7, 1, 2, data[:256], skipped_bytes=size), after]


def test_the_longest_frame_that_can_be_said_takes_no_memory() -> None:
    reader, piece = ttrpc.FrameReader(), bytes(1 << 20)
    tracemalloc.start()
    try:
        assert list(reader.feed(struct.pack(">IIBB", 0xFFFFFFFF, 1, 1, 0))) == []
        for _ in range(200):
            assert list(reader.feed(piece)) == []
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_any_bytes_are_frames(data: list[bytes]) -> None:
    reader = ttrpc.FrameReader()
    taken = sum(10 + len(frame.data) for piece in data for frame in reader.feed(piece))
    assert taken <= sum(map(len, data))


@given(st.text(max_size=40), st.text(max_size=40), st.binary(max_size=100), st.none() | st.integers(1, 600))
def test_a_request_is_read_and_written_as_the_specification_has_it(
    service: str, method: str, payload: bytes, seconds: int | None
) -> None:
    limit = None if seconds is None else float(seconds)
    data = nri_engine.request(method, payload, service=service, timeout_seconds=limit)
    request = Request(service, method, payload, limit)
    assert ttrpc.parse_request(data) == request
    assert ttrpc.parse_request(ttrpc.encode_request(request)) == request


@given(st.binary(max_size=100), st.integers(0, 16), st.text(max_size=40))
def test_a_response_is_read_and_written_as_the_specification_has_it(payload: bytes, code: int, message: str) -> None:
    status = nri_engine.field(1, code) + nri_engine.field(2, message)
    response = Response(payload, code, message)
    assert ttrpc.parse_response(nri_engine.field(1, status) + nri_engine.field(2, payload)) == response
    assert ttrpc.parse_response(ttrpc.encode_response(response)) == response


def test_what_a_later_version_adds_is_skipped() -> None:
    later = nri_engine.field(5, nri_engine.field(1, "trace") + nri_engine.field(2, "1")) + nri_engine.field(900, "new")
    assert ttrpc.parse_request(nri_engine.request("Configure") + later).method == "Configure"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for parse, kind in ((ttrpc.parse_request, Request), (ttrpc.parse_response, Response)):
        with contextlib.suppress(EngineUnsupported):
            assert isinstance(parse(data), kind)


# --- the multiplexer --------------------------------------------------------------------------------------------------


def test_a_frame_of_the_socket_is_its_connection_length_and_bytes() -> None:
    assert mux.frames(2, b"abc") == b"\x00\x00\x00\x02" + b"\x00\x00\x00\x03" + b"abc"
    assert list(mux.Demultiplexer().feed(mux.frames(2, b"abc"))) == [(2, b"abc")]


@given(st.integers(0, 12_000), st.integers(0, (1 << 32) - 1))
def test_an_engine_finds_room_for_each_frame(size: int, connection: int) -> None:
    """It reads into 4096 bytes, or into what is left of a message if that is more."""
    message = bytes(size)
    left = len(message)
    for got, payload in mux.Demultiplexer().feed(mux.frames(connection, message)):
        assert got == connection
        assert 0 < len(payload) <= (4096 if left == len(message) else max(4096, left))
        left -= len(payload)
    assert left == 0


@given(
    st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=9000)), max_size=6),
    st.lists(st.integers(0, 40_000), max_size=20),
)
def test_connections_are_told_apart_however_the_bytes_come_in(
    messages: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    demultiplexer = mux.Demultiplexer()
    found: dict[int, bytes] = {}
    for piece in pieces(b"".join(mux.frames(*message) for message in messages), cuts):
        for connection, payload in demultiplexer.feed(piece):
            found[connection] = found.get(connection, b"") + payload
    for connection, payload in found.items():
        assert payload == b"".join(data for number, data in messages if number == connection)
    assert sum(map(len, found.values())) == sum(len(data) for _, data in messages)


def test_a_long_frame_of_an_unknown_connection_is_refused_by_its_header_alone() -> None:
    for connection in (1, 2):  # of any length: what is in it is bounded
        assert list(mux.Demultiplexer().feed(struct.pack(">II", connection, 0xFFFFFFFF) + b"x")) == [(connection, b"x")]
    assert list(mux.Demultiplexer().feed(struct.pack(">II", 3, 4 << 20))) == []
    with pytest.raises(EngineUnsupported, match="that is not NRI"):
        list(mux.Demultiplexer().feed(struct.pack(">II", 3, (4 << 20) + 1)))


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_any_bytes_are_frames_of_connections_or_refused(data: list[bytes]) -> None:
    demultiplexer = mux.Demultiplexer()
    taken = 0
    try:
        for piece in data:
            taken += sum(8 + len(payload) for _, payload in demultiplexer.feed(piece))
    except EngineUnsupported:
        return
    assert taken <= sum(map(len, data))
