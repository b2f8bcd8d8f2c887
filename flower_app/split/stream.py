"""One encrypted stream of frames per site: mutual TLS 1.3 with the keys of this run, over gRPC.

What the frames hold is not known here. A peer is told by its certificate, which came over Flower's
own channel; whoever has another one gets nothing, whatever it sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from logging import WARNING
from threading import Lock
from typing import Any

import grpc
from flwr.common.logger import log

from models.section import ConfigError
from privacy.tls import HOST, Identity, clash, fingerprint, public_form

_SERVICE, _METHOD = "florilegium.Split", "Frames"
_PATH = f"/{_SERVICE}/{_METHOD}"
_ABOUT = "florilegium-about"  # a key of a stream's metadata
_KEEPALIVE_MS = 20_000
MOST_BYTES = 2**31 - 1  # of a frame: gRPC counts them in 32 bits

Frames = Iterator[bytes]


class Incoming(Frames):
    """The frames that a site sends, and what it said that its stream is `about`."""

    def __init__(self, frames: Frames, about: str) -> None:
        self._frames = frames
        self.about = about

    def __next__(self) -> bytes:
        """The next frame."""
        return next(self._frames)


# Site and the frames that it sends -> the frames that it is sent.
Handler = Callable[[str, Incoming], Frames]


def _options(max_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.max_send_message_length", max_bytes),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        ("grpc.so_reuseport", 0),
    ]


class StreamServer:
    """Serves the streams of sites; use as a context manager, or call `stop`.

    `sites` maps their names to certificates (PEM); `admit` names others later. A frame above
    `max_bytes` ends its stream, and no more than `most` streams are served at a time, `each` of one
    site: another one ends its oldest.
    """

    def __init__(
        self,
        identity: Identity,
        sites: Mapping[str, bytes],
        handler: Handler,
        *,
        address: str = "127.0.0.1:0",
        max_bytes: int,
        most: int = 256,
        each: int = 1,
    ) -> None:
        """Start serving; raises ConfigError where the address cannot be had."""
        self._each = each
        self._open: dict[str, list[grpc.ServicerContext]] = {}
        self._lock = Lock()
        self._identity = identity
        self._handler = handler
        self._server = grpc.server(ThreadPoolExecutor(most, "stream"), options=_options(max_bytes))
        self.admit(sites)
        serve = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: serve}),)
        )
        credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration, lambda: self._configuration, require_client_authentication=True
        )
        try:
            self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"Expected to listen at {address!r}, but: {error}; name a free port here."
            ) from error
        self._server.start()

    def admit(self, sites: Mapping[str, bytes]) -> None:
        """Serve these sites and no others from now on; streams that are open stay.

        Raises ConfigError for a certificate that cannot be used, or might be taken for another.
        """
        there: dict[str, bytes] = {}
        for site, certificate in sites.items():
            own = public_form(certificate)
            if clash(own, [self._identity.certificate, *there.values()]):
                raise ConfigError(
                    f"Expected a certificate and a key of {site!r} alone, got another one's; make "
                    "new ones."
                )
            there[site] = own
        self._sites = {fingerprint(certificate): site for site, certificate in there.items()}
        # Nobody has the key of the server's own certificate but the server itself.
        roots = b"".join(there.values()) or self._identity.certificate
        self._configuration = grpc.ssl_server_certificate_configuration(
            [(self._identity.key, self._identity.certificate)], root_certificates=roots
        )

    def _serve(self, frames: Frames, context: grpc.ServicerContext) -> Frames:
        found = context.auth_context()
        if found.get("ssl_tls_version") != [b"TLSv1.3"]:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Expected TLS 1.3.")
        site = None
        certificate = b"".join(found.get("x509_pem_cert", ()))
        with suppress(ConfigError):
            site = self._sites.get(fingerprint(certificate))
        if site is None:  # signed by a key of this run, but not one of its certificates
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Expected a certificate of this run.")
        assert site is not None
        with self._lock:
            streams = self._open.setdefault(site, [])
            streams.append(context)
            oldest = streams.pop(0) if len(streams) > self._each else None
        if oldest is not None:
            oldest.cancel()
        try:
            about = dict(context.invocation_metadata()).get(_ABOUT, "")
            yield from self._handler(site, Incoming(frames, str(about)))
        except Exception as error:
            # Its text may hold anything; the site needs to know that it is over, and no more.
            log(WARNING, "The stream of %s ended: %s", site, error)
            context.abort(grpc.StatusCode.ABORTED, "The server ended the stream; its log says why.")
        finally:
            with self._lock:
                if context in streams:
                    streams.remove(context)

    def stop(self) -> None:
        """End all streams."""
        self._server.stop(grace=None).wait()

    def __enter__(self) -> StreamServer:
        """Nothing to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()


class StreamError(ConnectionError):
    """A stream that could not be opened, or broke."""


def exchange(
    address: str,
    identity: Identity,
    server: bytes,
    frames: Frames,
    *,
    max_bytes: int,
    about: str = "",
    timeout: float | None = None,
) -> Frames:
    """Send frames to the server whose certificate (PEM) is `server`; yields what it sends back.

    The server is told what the stream is `about`. Raises StreamError when it cannot be had, breaks,
    or outlives `timeout` seconds.
    """
    credentials = grpc.ssl_channel_credentials(server, identity.key, identity.certificate)
    options = [*_options(max_bytes), ("grpc.ssl_target_name_override", HOST)]
    with grpc.secure_channel(address, credentials, options) as channel:
        try:
            call = channel.stream_stream(_PATH)
            yield from call(frames, timeout=timeout, metadata=((_ABOUT, about),))
        except grpc.RpcError as error:
            code, details = error.code(), str(error.details()).rstrip(".")
            raise StreamError(
                f"Expected a stream to the server at {address}, got {code.name}: {details}."
            ) from error
