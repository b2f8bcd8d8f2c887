"""Streams text from the model that a run tuned."""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from flower_app.config import Config, defaults, parse
from flower_app.data.format import prompt_maker
from flower_app.split.generate import Site, add_options
from flower_app.split.stream import StreamError
from models import base
from models.payload import virtual_tokens
from models.section import ConfigError
from models.split.adapter import middle_beside
from models.split.generate import greedy, sampling
from models.split.step import SplitError
from models.text import Frame


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the continuation of a prompt, token by token; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="generate", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="run folder, such as runs/latest")
    which.add_argument("--split", metavar="ADDRESS", help="server of the middle (below)")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", action="store_true", help="the base model, without the adapter")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        if options.split:
            across(options)
        else:
            generate(options)
    except (ConfigError, StreamError, SplitError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def generate(options: argparse.Namespace) -> None:
    """Load the run's model and stream; raises ConfigError when the folder is not a finished run."""
    folder: Path = options.run
    if not (folder / "config.toml").is_file() or not (folder / "adapter").is_dir():
        raise ConfigError(
            f"Expected a finished run with config.toml and adapter/, got {str(folder)!r}; name one "
            "with --run, such as runs/latest."
        )
    try:
        config = _config(folder)
        model, tokenizer = _read(config, folder, options.base)
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # A damaged file makes the libraries raise whatever they meet.
        raise ConfigError(
            f"Expected a run that can be read in {str(folder)!r}, got {type(error).__name__}: "
            f"{error}; name another with --run, or run it again."
        ) from error
    text = options.prompt
    if config.data.format in ("instruct", "choice"):
        text = prompt_maker(config.data.template)(text, "")  # asked as it was trained
    ids = _prompt(tokenizer, text)
    sampling = {"do_sample": options.temperature > 0}
    if sampling["do_sample"]:
        sampling["temperature"] = options.temperature
    with base.seeded(options.seed):
        model.generate(
            input_ids=ids.to(base.device()),
            attention_mask=torch.ones_like(ids).to(base.device()),
            max_new_tokens=_room(model, ids, options.max_new_tokens),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )


def across(options: argparse.Namespace) -> None:
    """Stream from a model whose middle is at a server; raises ConfigError and StreamError."""
    site = Site.load(options)
    tokenizer = AutoTokenizer.from_pretrained(site.folder)
    ids = _prompt(tokenizer, options.prompt)
    most = _room(site.tail.model, ids, options.max_new_tokens)
    warm = options.temperature > 0
    choose = sampling(options.temperature, options.seed) if warm else greedy
    printer = TextStreamer(tokenizer, skip_special_tokens=True)
    printer.put(ids)
    try:
        for token in site.tokens(ids, most, choose):
            printer.put(torch.tensor([token]))
    finally:
        printer.end()


def _config(folder: Path) -> Config:
    """Configuration of a run."""
    nested = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    stored = {f"{s}.{key}": value for s, keys in nested.items() for key, value in keys.items()}
    return parse(defaults() | stored)  # a run of an older version may lack a newer key


def _read(config: Config, folder: Path, plain: bool) -> tuple[Any, Any]:
    """Model and tokenizer of a run; `plain` leaves out what the run has trained."""
    if config.model.task != "causal-lm":
        raise ConfigError("Expected a run of a causal-lm, got a classification, which has no text.")
    model_folder = base.find_folder(config.model.name)
    base.quiet()
    whole = config.payload.kind == "full" and not plain
    if config.payload.kind == "split" and not plain and middle_beside(folder / "adapter"):
        raise ConfigError(
            f"Expected an adapter of the whole model in {str(folder)!r}, got a site's own, which "
            "has no middle; write with --split, or name the server's run."
        )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / "adapter" if whole else model_folder, dtype=getattr(torch, config.model.dtype)
    )
    if not whole and not plain:
        model = PeftModel.from_pretrained(model, folder / "adapter")
    return model.to(base.device()).eval(), tokenizer


def _prompt(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids of a prompt, shape (1, tokens), begun as texts are in training."""
    head = Frame.of(tokenizer, bos=True, eos=False).head
    ids = [*head, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ConfigError("Expected a --prompt with text in it, got none; write some words.")
    return torch.tensor([ids])


def _room(model: Any, ids: torch.Tensor, wanted: int) -> int:
    """How many tokens to write: as many as asked for, or as the model's context leaves room for."""
    if wanted < 1:
        raise ConfigError(f"Expected --max-new-tokens of at least 1, got {wanted}; raise it.")
    limit = base.context(model)
    virtual = virtual_tokens(model)
    room = wanted if limit is None else min(wanted, limit - virtual - ids.shape[1])
    if room < 1:
        raise ConfigError(
            f"Expected a --prompt shorter than the model's context of {limit} tokens, got "
            f"{ids.shape[1]} and {virtual} virtual ones; shorten it."
        )
    return room


if __name__ == "__main__":
    sys.exit(main())
