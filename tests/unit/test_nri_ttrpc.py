"""`nri.ttrpc` and `nri.mux`: frames of both layers, in pieces, hostile, and as the published engines read them."""

from __future__ import annotations

import contextlib
import itertools
import struct

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


def test_the_longest_message_passes_and_a_longer_one_is_refused_by_its_header_alone() -> None:
    longest = Frame(1, 1, 0, bytes(4 << 20))
    data = ttrpc.encode_frame(longest)
    assert list(ttrpc.FrameReader().feed(data)) == [longest]
    with pytest.raises(EngineUnsupported, match="4194305 bytes"):
        ttrpc.encode_frame(Frame(1, 1, 0, bytes((4 << 20) + 1)))
    with pytest.raises(EngineUnsupported, match="4194305 bytes, more than ttrpc allows"):
        list(ttrpc.FrameReader().feed(struct.pack(">IIBB", (4 << 20) + 1, 1, 1, 0)))


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_any_bytes_are_frames_or_refused(data: list[bytes]) -> None:
    reader = ttrpc.FrameReader()
    taken = 0
    try:
        for piece in data:
            taken += sum(10 + len(frame.data) for frame in reader.feed(piece))
    except EngineUnsupported:
        return
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


def test_a_frame_of_the_socket_that_no_message_fills_is_refused_by_its_header_alone() -> None:
    assert list(mux.Demultiplexer().feed(struct.pack(">II", 1, (4 << 20) + 10))) == []
    with pytest.raises(EngineUnsupported, match="that is not NRI"):
        list(mux.Demultiplexer().feed(struct.pack(">II", 1, (4 << 20) + 11)))


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
