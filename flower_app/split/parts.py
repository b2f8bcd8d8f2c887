"""The parts of a split model: cut a folder, make keys, serve the middle to sites that write."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from flower_app.split.stream import MOST_BYTES, StreamServer
from models.base import context, device, find_folder, quiet
from models.section import ConfigError
from models.split.cut import Middle
from models.split.generate import MiddleGeneration, load_for_text
from models.split.link import Limits
from models.split.load import SERVER, Cuts, digest_of_parts, read_record, write_parts
from privacy.tls import Identity, read_pem

WIRE = "fp32"  # one token at a time: exact, and small beside the way there and back
_OVERHEAD = 4096  # bytes of a frame beside its values, with room
_TEXTS = 16  # that a site may write at a time
_TOKENS = 8192  # of a model that sets no limit itself


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; exit status 2 on bad input."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        options.act(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="split", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    cut = commands.add_parser("cut", help="write the parts of a model into two folders")
    cut.add_argument("model", help="folder in hub format, hub id, or 'embedded'")
    cut.add_argument("--out", type=Path, required=True, help="gets the folders site and server")
    cut.add_argument("--task", choices=("causal-lm", "classification"), default="causal-lm")
    add_cut(cut)
    cut.set_defaults(act=_cut)

    keys = commands.add_parser("keys", help="make a key, and the certificate to hand out for it")
    keys.add_argument("folder", type=Path)
    keys.add_argument("--days", type=int, default=30, help="for how long")
    keys.set_defaults(act=_keys)

    serve = commands.add_parser("serve", help="serve the middle to ./scripts/generate --split")
    add_model(serve)
    serve.add_argument("--keys", type=Path, required=True, help="folder of `keys`")
    serve.add_argument("--address", default="127.0.0.1:9094", help="where to listen")
    serve.add_argument(
        "--certificate-of", action="append", required=True, metavar="SITE=FILE",
        help="a site that is let in; may be given again",
    )  # fmt: skip
    serve.add_argument(
        "--most-tokens", type=int, default=0, help="of a text; 0: the context, if it fits"
    )
    serve.set_defaults(act=_serve)
    return parser


def add_cut(parser: argparse._ActionsContainer) -> None:
    """Options that say where a model is cut."""
    parser.add_argument("--head-blocks", type=int, help="at the site; 1, or as the parts were cut")
    parser.add_argument("--tail-blocks", type=int, help="at the site; 1, or as the parts were cut")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that name a side's folders."""
    parser.add_argument("--model", required=True, help="folder of the whole or of this side")
    parser.add_argument("--adapter", type=Path, help="joined adapter, the same at both sides")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_cut(parser)


def cuts_of(options: argparse.Namespace, folder: Path, task: str = "causal-lm") -> Cuts:
    """Where a model is cut: as the options say, or as its parts were cut, or 1 and 1."""
    told = read_record(folder)
    known = told.cuts if told else Cuts()
    head = known.head_blocks if options.head_blocks is None else options.head_blocks
    tail = known.tail_blocks if options.tail_blocks is None else options.tail_blocks
    return Cuts(head, tail, "classification" if task == "classification" else "causal-lm")


def max_bytes(limits: Limits) -> int:
    """Largest frame of a stream in which a text travels; raises ConfigError for none that fits."""
    if limits.most_tokens > (room := _room(limits.hidden_size)):
        raise ConfigError(
            f"Expected at most {room} tokens at once, which one message has room for with hidden "
            f"size {limits.hidden_size}, got {limits.most_tokens}; lower --most-tokens at the "
            "server, or shorten the --prompt."
        )
    return limits.most_tokens * limits.hidden_size * 4 + _OVERHEAD


def most_tokens(asked: int, context: int | None, hidden_size: int) -> int:
    """Tokens of a text: as asked for, or (0) as the context has, if one message has room for it."""
    return asked or min(context or _TOKENS, _room(hidden_size))


def _room(hidden_size: int) -> int:
    return (MOST_BYTES - _OVERHEAD) // (4 * hidden_size)


def _cut(options: argparse.Namespace) -> None:
    folder = find_folder(options.model)
    cuts = cuts_of(options, folder, options.task)
    places = write_parts(folder, options.out, cuts)
    for place, written in places.items():
        size = sum(path.stat().st_size for path in written.iterdir())
        print(f"{place:<7} {size / 1e6:9.1f} MB  {written}")
    print(f"digest of model and cut  {digest_of_parts(places['site'], cuts)}")


def _keys(options: argparse.Namespace) -> None:
    Identity.fresh(options.days).write(options.folder)
    print(f"key.pem stays in {options.folder}; hand certificate.pem to the other side.")


def _serve(options: argparse.Namespace) -> None:
    from flower_app.local import stop_on_terminate  # not in the bundle that sites receive

    folder = find_folder(options.model, tokenizer=False)
    parts, digest = load_for_text(
        folder, SERVER, cuts_of(options, folder), options.adapter, getattr(torch, options.dtype)
    )
    middle = parts["middle"].to(device())
    assert isinstance(middle, Middle)
    hidden, limit = middle.model.config.get_text_config().hidden_size, context(middle.model)
    most = most_tokens(options.most_tokens, limit, hidden)
    limits = Limits(most, hidden, WIRE)
    service = MiddleGeneration(middle, digest, limits)
    sites = dict(map(_certificate, options.certificate_of))
    with StreamServer(
        Identity.read(options.keys), sites, service.serve, address=options.address,
        max_bytes=max_bytes(limits), each=_TEXTS,
    ) as server:  # fmt: skip
        host = options.address.rpartition(":")[0]
        cut = not options.most_tokens and most < (limit or 0)
        bound = f", of the model's {limit}, which is what one message has room for" if cut else ""
        print(
            f"Serving the middle to {', '.join(sorted(sites))} at {host}:{server.port}, texts of "
            f"up to {most} tokens{bound}; Ctrl-C ends it.",
            flush=True,
        )
        stop_on_terminate()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("Stopped.")


def _certificate(given: str) -> tuple[str, bytes]:
    site, _, path = given.partition("=")
    if not site or not path:
        raise ConfigError(
            f"Expected --certificate-of SITE=FILE, got {given!r}; write for example "
            "north=north/certificate.pem."
        )
    return site, read_pem(Path(path))


if __name__ == "__main__":
    sys.exit(main())
