"""The embedded base model: a small Llama trained once on the reference text of this CPython.

It needs no download: the text is `pydoc_data.topics`, which ships with the interpreter. The result
is a folder in hub format in the user's cache, built by one process while others wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.section import ConfigError

Log = Callable[[str], None]

STAMP = "florilegium.json"
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass(frozen=True)
class Recipe:
    """Everything we choose about the embedded model; another recipe is another cache folder."""

    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 384
    max_positions: int = 512
    passage_chars: int = 800
    seq_length: int = 256
    batch_size: int = 4
    steps: int = 320
    warmup: float = 0.05
    embedding_learning_rate: float = 6e-3
    matrix_learning_rate: float = 0.015
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    threads: int = 2


def ensure(
    folder: Path | None = None, log: Log | None = None, recipe: Recipe | None = None
) -> Path:
    """Return the folder of the embedded model in hub format, building it if it is not there.

    `folder` is the model's own folder, by default one named by `digest` in `cache_root`. Any number
    of processes may call this at once: one builds, the others wait. The folder appears whole or not
    at all. `log` gets a line every few seconds (default: standard error). Same recipe, libraries
    and CPU: same bytes, whatever the number of threads in use. Raises ConfigError if the folder
    cannot be written, holds something else, or the reference text is missing.
    """
    recipe = recipe or Recipe()
    log = log or _to_stderr
    text = reference_text()
    key = digest(recipe, text)
    folder = (folder or cache_root() / f"embedded-{key[:16]}").absolute()
    if _is_built(folder, key):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, log):
            if not _is_built(folder, key):
                _build_into(folder, recipe, text, key, log)
    except OSError as error:
        raise ConfigError(
            f"Expected to be able to write the embedded model to {folder}, got: {error}; make room "
            "there, or set FLORILEGIUM_CACHE to a folder that can be written."
        ) from error
    return folder


def cache_root() -> Path:
    """Return the cache folder: FLORILEGIUM_CACHE, else `florilegium` in the user's cache."""
    if own := os.environ.get("FLORILEGIUM_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "florilegium"


def digest(recipe: Recipe, text: list[str]) -> str:
    """Return the SHA-256 of all that determines the model: recipe, text, libraries, machine."""
    libraries = [module.__version__ for module in (torch, transformers, tokenizers)]
    facts = [dataclasses.asdict(recipe), text, libraries, platform.machine()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def reference_text() -> list[str]:
    """Return the topics of the Python reference, sorted by name; raises ConfigError if absent."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError(
            "Expected the reference text of CPython (module pydoc_data.topics), got none in this "
            f"interpreter ({sys.executable}); use a full CPython, or set model.name to a folder."
        ) from error
    return [topics[name] for name in sorted(topics)]


def passages(text: list[str], at_least: int) -> list[str]:
    """Cut at blank lines into distinct passages of `at_least` characters or a topic's rest.

    Short documents teach the model where one begins and ends, as the sites' rows do.
    """
    found: dict[str, None] = {}
    for topic in text:
        passage = ""
        for paragraph in topic.split("\n\n"):
            passage = f"{passage}\n\n{paragraph}" if passage else paragraph
            if len(passage) >= at_least:
                found[passage] = None
                passage = ""
        if passage.strip():
            found[passage] = None
    return list(found)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _is_built(folder: Path, key: str) -> bool:
    """Whether `folder` holds this model; raises ConfigError if it holds something else."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        found = "no readable stamp"
    if found != key:
        raise ConfigError(
            f"Expected {folder} to hold the embedded model {key[:16]} or not to exist, got "
            f"{found[:16]!r} in its {STAMP}; delete the folder or name another one."
        )
    return True


@contextlib.contextmanager
def _locked(folder: Path, log: Log) -> Iterator[None]:
    """Hold the build lock of `folder`; it is freed by the system if its holder dies."""
    lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        log("Another process is building the embedded base model; waiting for it.")
        lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _build_into(folder: Path, recipe: Recipe, text: list[str], key: str, log: Log) -> None:
    """Build beside `folder` and move the whole into place; the caller holds the lock."""
    prefix = f".{folder.name}.part-"
    for left_by_a_killed_build in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_by_a_killed_build)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        began = time.monotonic()
        log(f"Building the embedded base model, once, in {folder} ({recipe.steps} steps).")
        documents = passages(text, recipe.passage_chars)
        tokenizer = train_tokenizer(documents, recipe)
        model = train_model(documents, tokenizer, recipe, log)
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)
        stamp = {"digest": key, "recipe": dataclasses.asdict(recipe)}
        (part / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        # Temporary folders and safetensors files are private; a model is not.
        part.chmod(0o755)
        for file in part.iterdir():
            file.chmod(0o644)
        part.rename(folder)
        log(f"Built the embedded base model in {time.monotonic() - began:.0f} s.")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def train_tokenizer(documents: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the documents; like Llama's it puts the start token first."""
    core = tokenizers.Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B:1",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=recipe.max_positions,
        clean_up_tokenization_spaces=False,
    )


def train_model(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, log: Log
) -> LlamaForCausalLM:
    """Train the model from seeded weights: Muon for the matrices of the blocks, AdamW for the rest.

    Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") gets a
    lower loss from the few steps that fit in a minute. The thread count is fixed inside and
    restored after.
    """
    # Sums are split by thread, so the number of threads is part of the recipe.
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with torch.enable_grad():
            model = _new_model(tokenizer, recipe)
            _fit(model, _windows(documents, tokenizer, recipe), recipe, log)
            model.eval()
            return model
    finally:
        torch.set_num_threads(threads)


def _new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Make the model with weights drawn from the recipe's seed, not from the global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.02, generator=generator)
    return model


def _windows(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[torch.Tensor]:
    """Yield batches (batch_size, seq_length) of token ids, reshuffled and shifted in every pass."""
    encoded = tokenizer(documents)["input_ids"]
    stream = torch.tensor([i for ids in encoded for i in (*ids, tokenizer.eos_token_id)])
    length = recipe.seq_length
    generator = torch.Generator().manual_seed(recipe.seed)
    starts = torch.empty(0, dtype=torch.long)
    while True:
        while len(starts) < recipe.batch_size:
            offset = int(torch.randint(length, (1,), generator=generator))
            fresh = torch.arange(offset, len(stream) - length, length)
            order = torch.randperm(len(fresh), generator=generator)
            starts = torch.cat([starts, fresh[order]])
        now, starts = starts[: recipe.batch_size], starts[recipe.batch_size :]
        yield stream[now[:, None] + torch.arange(length)]


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """One optimiser for the blocks' matrices, one for embeddings (tied to the head) and norms."""
    embedding = model.get_input_embeddings().weight
    matrices = [w for w in model.parameters() if w.ndim == 2 and w is not embedding]
    others = [w for w in model.parameters() if w.ndim != 2 or w is embedding]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay
        ),
        torch.optim.AdamW(
            others, lr=recipe.embedding_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        ),
    ]


def _fit(
    model: LlamaForCausalLM, batches: Iterator[torch.Tensor], recipe: Recipe, log: Log
) -> None:
    """Take the recipe's steps, with a linear warm-up and then a linear fall of the rate to 0."""
    optimizers = _optimizers(model, recipe)
    warmup = max(1, round(recipe.warmup * recipe.steps))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(
                (step + 1) / warmup, (recipe.steps - step) / max(1, recipe.steps - warmup)
            ),
        )
        for optimizer in optimizers
    ]
    began = reported = time.monotonic()
    for step in range(1, recipe.steps + 1):
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        now = time.monotonic()
        if now - reported >= 3.0 or step == recipe.steps:
            reported = now
            left = (now - began) / step * (recipe.steps - step)
            log(
                f"Embedded base model: step {step}/{recipe.steps}, loss {loss.item():.2f}, "
                f"{left:.0f} s left."
            )
