"""The encrypted stream: who gets in, what a listener sees, and what a bad frame does to others."""

from __future__ import annotations

import base64
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from flower_app.bench.proxy import DelayingProxy
from flower_app.split.stream import Frames, StreamError, StreamServer, exchange
from models.section import ConfigError
from privacy.tls import HOST, Identity, clash, fingerprint, public_form

SECRET = b"patient 4711 has a cough and " * 20
MOST = 100_000


def reversed_frames(site: str, frames: Frames) -> Frames:
    for frame in frames:
        if frame == b"break":
            raise ValueError("something of the rows")
        yield site.encode() + b":" + frame[::-1]


@pytest.fixture(scope="module")
def keys() -> dict[str, Identity]:
    return {name: Identity.fresh() for name in ("server", "north", "south", "other")}


@pytest.fixture
def server(keys: dict[str, Identity]) -> Iterator[StreamServer]:
    sites = {name: keys[name].certificate for name in ("north", "south")}
    with StreamServer(keys["server"], sites, reversed_frames, max_bytes=MOST) as running:
        yield running


def ask(
    server: StreamServer, keys: dict[str, Identity], who: str, *frames: bytes, port: int = 0
) -> list[bytes]:
    address = f"127.0.0.1:{port or server.port}"
    return list(
        exchange(
            address, keys[who], keys["server"].certificate, iter(frames), max_bytes=MOST, timeout=20
        )
    )


def test_sites_are_told_by_their_certificates(
    server: StreamServer, keys: dict[str, Identity]
) -> None:
    assert ask(server, keys, "north", b"abc", b"de") == [b"north:cba", b"north:ed"]
    assert ask(server, keys, "south", b"abc") == [b"south:cba"]
    assert fingerprint(keys["north"].certificate) != fingerprint(keys["south"].certificate)
    assert repr(keys["north"]) == "Identity(...)"


def test_keys_of_another_run_get_nothing(server: StreamServer, keys: dict[str, Identity]) -> None:
    with pytest.raises(StreamError, match="UNAVAILABLE"):
        ask(server, keys, "other", b"abc")
    wrong_server = keys | {"server": keys["other"]}
    with pytest.raises(StreamError, match="UNAVAILABLE"):
        ask(server, wrong_server, "north", b"abc")
    assert ask(server, keys, "north", b"abc") == [b"north:cba"]


def test_a_site_cannot_vouch_for_another_key(tmp_path: Path, keys: dict[str, Identity]) -> None:
    """Every certificate of the run is a root of trust; what counts is which one it is."""
    sites = {name: keys[name].certificate for name in ("north", "south")}
    with StreamServer(keys["server"], sites, reversed_frames, max_bytes=MOST) as running:
        running._sites.pop(fingerprint(keys["south"].certificate))
        with pytest.raises(StreamError, match="UNAUTHENTICATED: Expected a certificate of this"):
            ask(running, keys, "south", b"abc")


def of_no_known_version(certificate: bytes) -> bytes:
    """The same with version 6 in it."""
    lines = certificate.decode().splitlines()
    der = base64.b64decode("".join(lines[1:-1]))
    at = der.index(bytes.fromhex("a003020102"))
    other = base64.encodebytes(der[:at] + bytes.fromhex("a003020105") + der[at + 5 :])
    return b"\n".join([lines[0].encode(), other.strip(), lines[-1].encode(), b""])


BOGUS = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("spoil", [bytes.rstrip, lambda pem: pem + BOGUS], ids=["bare", "more"])
def test_how_a_certificate_is_written_locks_nobody_out(
    keys: dict[str, Identity], spoil: Any, first: bool
) -> None:
    own = {"north": spoil(keys["north"].certificate), "south": keys["south"].certificate}
    sites = own if first else dict(reversed(own.items()))
    with StreamServer(keys["server"], sites, reversed_frames, max_bytes=MOST) as running:
        for name in own:
            assert ask(running, keys, name, b"abc") == [name.encode() + b":cba"]


def test_certificates_that_might_be_taken_for_others_are_refused(keys: dict[str, Identity]) -> None:
    north = keys["north"].certificate
    for wrong in (of_no_known_version(north), BOGUS, b"", another_kind_of_key()):
        with pytest.raises(ConfigError, match="Expected a certificate in PEM form that signs"):
            public_form(wrong)
    namesake = of_the_same_name(north)
    assert clash(namesake, [north]) and not clash(north, [keys["south"].certificate])
    for other in (north, namesake, keys["server"].certificate):
        sites = {"north": north, "south": other}
        with pytest.raises(ConfigError, match="a certificate and a key of 'south' alone"):
            StreamServer(keys["server"], sites, reversed_frames, max_bytes=MOST)


def signed(name: x509.Name, key: Any) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM)


def of_the_same_name(certificate: bytes) -> bytes:
    name = x509.load_pem_x509_certificate(certificate).subject
    return signed(name, ec.generate_private_key(ec.SECP256R1()))


def another_kind_of_key() -> bytes:
    return signed(x509.Name([]), ec.generate_private_key(ec.SECP384R1()))


@pytest.mark.parametrize("credentials", ["none", "server alone"])
def test_without_a_key_nobody_gets_in(
    server: StreamServer, keys: dict[str, Identity], credentials: str
) -> None:
    address = f"127.0.0.1:{server.port}"
    trusted = grpc.ssl_channel_credentials(keys["server"].certificate)
    options = [("grpc.ssl_target_name_override", HOST)]
    channel = (
        grpc.insecure_channel(address)
        if credentials == "none"
        else grpc.secure_channel(address, trusted, options)
    )
    with channel, pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
        list(channel.stream_stream("/florilegium.Split/Frames")(iter([b"abc"]), timeout=20))


def test_older_tls_is_refused(
    server: StreamServer, keys: dict[str, Identity], tmp_path: Path
) -> None:
    for name, content in (
        ("key", keys["north"].key),
        ("own", keys["north"].certificate),
        ("server", keys["server"].certificate),
    ):
        (tmp_path / name).write_bytes(content)
    for version, served in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.maximum_version = version
        context.load_verify_locations(tmp_path / "server")
        context.load_cert_chain(tmp_path / "own", tmp_path / "key")
        context.set_alpn_protocols(["h2"])
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        with context.wrap_socket(raw, server_hostname=HOST) as wrapped:
            assert (b"north:cba" in spoken(wrapped)) is served


def spoken(wrapped: ssl.SSLSocket) -> bytes:
    """What the server answers to a frame, in HTTP/2 by hand: gRPC cannot be told to use TLS 1.2."""

    def field(name: bytes, value: bytes) -> bytes:
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    def http2(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        return head + payload

    headers = b"".join(
        field(name, value)
        for name, value in (
            (b":method", b"POST"), (b":scheme", b"https"),
            (b":path", b"/florilegium.Split/Frames"), (b":authority", HOST.encode()),
            (b"content-type", b"application/grpc"), (b"te", b"trailers"),
        )
    )  # fmt: skip
    wrapped.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2(4, 0, 0, b"") + http2(1, 4, 1, headers)
        + http2(0, 1, 1, b"\x00\x00\x00\x00\x03abc")
    )  # fmt: skip
    wrapped.settimeout(2)
    answer = b""
    try:
        while b"cba" not in answer and (chunk := wrapped.recv(4096)):
            answer += chunk
    except (TimeoutError, OSError):
        pass
    return answer


def test_a_bad_frame_ends_its_own_stream_alone(
    server: StreamServer, keys: dict[str, Identity]
) -> None:
    asked = threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"first"
        asked.wait(20)
        yield b"last"

    answers = exchange(
        f"127.0.0.1:{server.port}", keys["south"], keys["server"].certificate, slow(),
        max_bytes=MOST, timeout=30,
    )  # fmt: skip
    assert next(answers) == b"south:tsrif"
    with pytest.raises(StreamError, match="ABORTED: The server ended the stream; its log"):
        ask(server, keys, "north", b"break")
    with pytest.raises(StreamError, match="RESOURCE_EXHAUSTED"):
        ask(server, keys, "north", bytes(MOST + 1))
    asked.set()
    assert list(answers) == [b"south:tsal"]


def test_a_site_has_one_stream_at_a_time(keys: dict[str, Identity]) -> None:
    """One that opens more ends its own, and takes no thread from the others."""
    sites = {name: keys[name].certificate for name in ("north", "south")}
    ends = threading.Event()

    def idle() -> Iterator[bytes]:
        yield b"abc"
        ends.wait(20)

    with StreamServer(keys["server"], sites, reversed_frames, max_bytes=MOST, most=4) as running:
        opened = [
            exchange(
                f"127.0.0.1:{running.port}", keys["north"], keys["server"].certificate, idle(),
                max_bytes=MOST, timeout=20,
            )
            for _ in range(12)
        ]  # fmt: skip
        assert [next(one) for one in opened] == [b"north:cba"] * 12
        assert ask(running, keys, "south", b"abc") == [b"south:cba"]
        for older in opened[:-1]:
            with pytest.raises(StreamError, match="CANCELLED"):
                next(older)
        assert len(running._open["north"]) == 1
        ends.set()
        assert list(opened[-1]) == []


def test_a_listener_in_between_sees_no_plain_text(
    server: StreamServer, keys: dict[str, Identity]
) -> None:
    seen: list[bytes] = []
    with DelayingProxy(server.port, seen=seen.append) as proxy:
        assert ask(server, keys, "north", SECRET, port=proxy.port) == [b"north:" + SECRET[::-1]]
    passed = b"".join(seen)
    assert len(passed) == proxy.passed > 2 * len(SECRET)
    assert SECRET[:12] not in passed and SECRET[::-1][:12] not in passed


def test_what_cannot_be_had_is_refused(server: StreamServer, keys: dict[str, Identity]) -> None:
    taken = f"127.0.0.1:{server.port}"
    with pytest.raises(ConfigError, match=rf"Expected to listen at '{taken}', but"):
        StreamServer(
            keys["server"], {"north": keys["north"].certificate}, reversed_frames, address=taken,
            max_bytes=MOST,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="Expected a certificate in PEM form"):
        fingerprint(b"no")
    with pytest.raises(StreamError, match="UNAVAILABLE"):
        ask(server, keys, "north", b"abc", port=1)
    started = time.monotonic()
    answers = exchange(
        f"127.0.0.1:{server.port}", keys["north"], keys["server"].certificate, iter_forever(),
        max_bytes=MOST, timeout=1,
    )  # fmt: skip
    with pytest.raises(StreamError, match="DEADLINE_EXCEEDED"):
        list(answers)
    assert time.monotonic() - started < 20


def iter_forever() -> Iterator[bytes]:
    time.sleep(5)
    yield b"late"
