"""The site's side of text from a split model: head and tail here, the middle a stream away."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flower_app.split.parts import WIRE, add_cut, cuts_of, max_bytes
from flower_app.split.stream import exchange
from models.base import device, find_folder, quiet
from models.section import ConfigError
from models.split.cut import Head, Tail
from models.split.generate import Choose, ends_of, generate, load_for_text
from models.split.link import FrameLink, Limits
from models.split.load import SITE
from privacy.tls import Identity, read_pem

_NEEDED = ("model", "keys", "server_certificate")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that go with `--split`."""
    group = parser.add_argument_group("with --split")
    group.add_argument("--model", help="model folder of the site, or of the whole")
    group.add_argument("--adapter", type=Path, help="joined adapter, the same at both sides")
    group.add_argument("--keys", type=Path, help="folder that `./scripts/split keys` made")
    group.add_argument("--server-certificate", type=Path, help="certificate.pem of the server")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_cut(group)


@dataclass(frozen=True)
class Site:
    """Head and tail of a model, and the way to its middle."""

    folder: Path
    head: Head
    tail: Tail
    digest: str
    address: str
    identity: Identity
    server: bytes

    @classmethod
    def load(cls, options: argparse.Namespace) -> Site:
        """Read what the options name; raises ConfigError."""
        missing = [name for name in _NEEDED if getattr(options, name) is None]
        if missing:
            raise ConfigError(
                f"Expected --{missing[0].replace('_', '-')} with --split, got none; name it."
            )
        quiet()
        folder = find_folder(options.model)
        dtype = getattr(torch, options.dtype)
        parts, digest = load_for_text(
            folder, SITE, cuts_of(options, folder), options.adapter, dtype
        )
        head, tail = (parts[name].to(device()) for name in SITE)
        assert isinstance(head, Head) and isinstance(tail, Tail)
        identity, server = Identity.read(options.keys), read_pem(options.server_certificate)
        return cls(folder, head, tail, digest, options.split, identity, server)

    def tokens(self, ids: Tensor, most: int, choose: Choose) -> Iterator[int]:
        """Token ids that continue `ids` (1, tokens); raises StreamError where the server is not."""
        hidden = self.tail.model.config.get_text_config().hidden_size
        limits = Limits(ids.shape[1], hidden, WIRE)  # the answer to the prompt is the largest
        ask = partial(
            exchange, self.address, self.identity, self.server, max_bytes=max_bytes(limits)
        )
        ends = ends_of(self.folder, self.tail)
        with FrameLink(ask, limits) as link:
            yield from generate(
                self.head, self.tail, link, ids.to(device()), model=self.digest, most=most,
                choose=choose, ends=ends,
            )  # fmt: skip
