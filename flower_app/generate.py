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

from flower_app.config import parse
from models import base
from models.section import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the continuation of a prompt, token by token; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="generate", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, such as runs/latest")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", action="store_true", help="the base model, without the adapter")
    options = parser.parse_args(arguments)
    try:
        generate(options)
    except ConfigError as error:
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
    nested = tomllib.loads((folder / "config.toml").read_text())
    config = parse({f"{s}.{key}": value for s, keys in nested.items() for key, value in keys.items()})
    if config.model.task != "causal-lm":
        raise ConfigError("Expected a run of a causal-lm, got a classification, which has no text.")
    model_folder = base.find_folder(config.model.name)
    base.quiet()
    whole = config.payload.kind == "full" and not options.base
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / "adapter" if whole else model_folder, dtype=getattr(torch, config.model.dtype)
    )
    if not whole and not options.base:
        model = PeftModel.from_pretrained(model, folder / "adapter")
    model.to(base.device()).eval()
    inputs = tokenizer(options.prompt, return_tensors="pt").to(base.device())
    sampling = {"do_sample": options.temperature > 0}
    if sampling["do_sample"]:
        sampling["temperature"] = options.temperature
    with base.seeded(options.seed):
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )


if __name__ == "__main__":
    sys.exit(main())
