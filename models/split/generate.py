"""Text from a model in three parts: prompt, logits and text are at the site alone.

Each part keeps the keys and values of its own blocks, so that after the prompt one token's hidden
states cross the cut for each token written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from models.section import ConfigError
from models.split.adapter import digest_of_adapter, load_adapter, middle_beside, read_settings
from models.split.cut import Head, Middle, Part, Tail
from models.split.link import FrameLink, Frames, Limits
from models.split.load import Cuts, PartName, digest_of_parts, load_parts, load_split
from models.split.messages import Kind, Message
from models.split.step import SplitError

_TOP_K = 50  # as transformers has it where nothing else is asked for

# Logits (vocabulary) of the next token -> its id.
Choose = Callable[[Tensor], int]


def greedy(logits: Tensor) -> int:
    """The likeliest token."""
    return int(logits.argmax())


def sampling(temperature: float, seed: int) -> Choose:
    """Draws among the 50 likeliest tokens, as transformers' `generate` does by default."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        scores = logits.float().cpu() / temperature
        least = scores.topk(min(_TOP_K, len(scores))).values[-1]
        likely = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
        return int(likely.multinomial(1, generator=generator))

    return choose


def ends_of(folder: Path, tail: Tail) -> set[int]:
    """Ids of the tokens that end a text of the model in a folder."""
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:  # no generation_config.json
        found = tail.model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found} - {None}


def load_for_text(
    folder: Path,
    wanted: Collection[PartName],
    cuts: Cuts,
    adapter: Path | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[PartName, Part], str]:
    """Parts of a causal model with their share of an adapter, and the digest of both.

    The digest is the same at both sides, whatever the ends of a site's own adapter are. Raises
    ConfigError for folders that do not fit.
    """
    digest = digest_of_parts(folder, cuts)
    if adapter is None:
        return load_parts(folder, wanted, cuts, dtype=dtype), digest
    settings = read_settings(adapter)
    if "middle" in wanted and middle_beside(adapter):
        raise ConfigError(
            f"Expected an adapter with a middle in {str(adapter)!r}, got a site's own, which has "
            "none; name the folder `adapter` of the server's run."
        )
    every, _ = load_split(folder, wanted, cuts, dtype=dtype, payload=settings)
    parts: dict[PartName, Part] = {name: getattr(every, name) for name in wanted}
    for part in parts.values():
        load_adapter(part, adapter)
    both = f"{digest}:{digest_of_adapter(adapter, every.middle)}"
    return parts, hashlib.sha256(both.encode()).hexdigest()


def generate(
    head: Head,
    tail: Tail,
    link: FrameLink,
    ids: Tensor,
    *,
    model: str,
    most: int,
    choose: Choose = greedy,
    ends: frozenset[int] | set[int] = frozenset(),
) -> Iterator[int]:
    """Token ids that continue `ids` (1, tokens), up to `most` or the first of `ends`, included.

    `model` is the digest of model and adapter, which the server's must equal. Raises what ended
    the stream.
    """
    link.open(number_of(model)).result()
    caches = (_cache(head), _cache(tail))
    new, position = ids, 0
    for _ in range(most):
        with torch.no_grad():
            hidden = head(new, past_key_values=caches[0], use_cache=True)
            behind = link.generate(position, hidden).result().to(hidden)
            logits = tail(behind, past_key_values=caches[1], use_cache=True, logits_to_keep=1)
        position += new.shape[1]
        token = choose(logits[0, -1])
        yield token
        if token in ends:
            return
        new = ids.new_tensor([[token]])


class MiddleGeneration:
    """The server's end: the middle, with a cache for each stream that is freed when it ends.

    A text of a site has at most as many tokens as a message may have (`limits`).
    """

    def __init__(self, middle: Middle, model: str, limits: Limits) -> None:
        self._middle = middle
        self._model = model
        self._limits = limits
        self._weight = next(middle.parameters())

    def serve(self, site: str, frames: Frames) -> Frames:
        """Answer a site's frames until they end; raises WireError and SplitError for bad ones."""
        cache: DynamicCache | None = None
        for frame in frames:
            question = self._limits.decode(frame)
            if question.kind is Kind.OPEN:
                cache = self._opened(site, question.key)
                answer = Message(Kind.OPENED, question.key)
            elif question.kind is Kind.GENERATE and cache is not None:
                assert question.values is not None  # decoded so
                behind = self._continued(site, question.key, question.values, cache)
                answer = Message(Kind.GENERATED, question.key, behind)
            else:
                raise SplitError(
                    f"Expected OPEN and then GENERATE of {site!r}, got {question.kind.name}."
                )
            yield answer.encode(self._limits.precision)

    def _opened(self, site: str, number: int) -> DynamicCache:
        if number != number_of(self._model):
            raise SplitError(
                f"Expected the model and adapter {number_of(self._model):016x} of {site!r}, got "
                f"{number:016x}; give both sides the same folders and the same cut."
            )
        return _cache(self._middle)

    @torch.no_grad()
    def _continued(self, site: str, position: int, hidden: Tensor, cache: DynamicCache) -> Tensor:
        have, most = cache.get_seq_length(), self._limits.most_tokens
        if position != have or len(hidden) != 1:
            raise SplitError(
                f"Expected one text of {site!r} to go on at token {have}, got {len(hidden)} at "
                f"token {position}."
            )
        if have + hidden.shape[1] > most:
            raise SplitError(
                f"Expected a text of at most {most} tokens of {site!r}, got more; raise "
                "--most-tokens."
            )
        behind: Tensor = self._middle(
            hidden.to(self._weight), past_key_values=cache, use_cache=True
        )
        return behind


def number_of(digest: str) -> int:
    """A digest as it travels: its first 64 bits, enough to notice a mistake."""
    return int(digest[:16], 16)


def _cache(part: Part) -> DynamicCache:
    return DynamicCache(config=part.model.config)
