"""Cutting a model into head, middle and tail (FL-GLM, Zheng et al. 2024, section 3.1).

Every part is the library's own model with its share of the blocks, to which hidden states are
handed as `inputs_embeds`, so that attention, masks and positions are computed as in the whole.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.section import ConfigError
from models.split.anatomy import Anatomy, anatomy_of, renumber, replace, submodule


class Part(nn.Module):
    """A part of a model: the library's own `model`, with the blocks from `first` alone."""

    def __init__(self, model: Any, place: str, blocks: str, first: int) -> None:
        super().__init__()
        self.model = model
        self.place = place
        self.blocks = blocks
        self.first = first

    def name_in_whole(self, name: str) -> str:
        """What the whole model calls a tensor or module of this part."""
        inside = self.place + name.removeprefix("model.")
        before, blocks, after = inside.partition(f"{self.blocks}.")
        if not blocks:
            return inside
        index, _, rest = after.partition(".")
        return f"{before}{blocks}{int(index) + self.first}{'.' if rest else ''}{rest}"

    def owner_in_whole(self, name: str) -> str:
        """What the whole model calls the block that holds a tensor, or else its module."""
        known = self.name_in_whole(name)
        before, blocks, after = known.partition(f"{self.blocks}.")
        if not blocks:
            return known.rpartition(".")[0]
        return f"{before}{blocks}{after.partition('.')[0]}"


class Head(Part):
    """Embeddings and first blocks, at the site."""

    @property
    def virtual_tokens(self) -> int:
        """Positions before every text that hidden states have too."""
        return 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        """Hidden states (batch, tokens, hidden) of token ids (batch, tokens)."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **rest)
        return found.last_hidden_state


class Middle(Part):
    """The blocks between, at the server."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        """Hidden states of hidden states, both (batch, tokens, hidden)."""
        found = self.model(inputs_embeds=hidden, attention_mask=attention_mask, **rest)
        return found.last_hidden_state


class Tail(Part):
    """Last blocks, final norm and the head of the task, at the site."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        """Logits of hidden states: (batch, tokens, vocabulary), or (batch, classes)."""
        return self.output(hidden, attention_mask, **rest).logits

    def output(self, hidden: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        """The library's whole output; with `labels` it holds the loss."""
        return self.model(inputs_embeds=hidden, attention_mask=attention_mask, **rest)


class Parts(NamedTuple):
    """The three parts of one model."""

    head: Head
    middle: Middle
    tail: Tail


def twin(part: Middle) -> Middle:
    """A part with trained tensors of its own, and the same frozen ones."""
    frozen = [t for t in part.parameters() if not t.requires_grad] + list(part.buffers())
    found: Middle = copy.deepcopy(part, {id(tensor): tensor for tensor in frozen})
    return found


def cut(model: Any, head_blocks: int = 1, tail_blocks: int = 1) -> Parts:
    """Cut a model after its first `head_blocks` and before its last `tail_blocks` blocks.

    The parts share the model's own tensors and take its blocks over; the model itself is not to be
    used any more. An embedding that is also the output layer stays one tensor in head and tail.
    Raises ConfigError for a model that cannot be cut, and for too many blocks.
    """
    prefix, anatomy = anatomy_of(model)
    backbone = getattr(model, prefix)
    blocks = submodule(backbone, anatomy.blocks)
    if min(head_blocks, tail_blocks) < 1 or head_blocks + tail_blocks >= len(blocks):
        raise ConfigError(
            f"Expected at least one block in each part of a model of {len(blocks)}, got "
            f"split.head-blocks={head_blocks} and split.tail-blocks={tail_blocks}; their sum must "
            f"be below {len(blocks)}."
        )
    if type(model).__name__.endswith("ForSequenceClassification") and not anatomy.encoder:
        raise ConfigError(
            f"Expected an encoder for split classification, got a {type(model).__name__}, whose "
            "class head looks for padding in the token ids; take an encoder, or a causal task."
        )
    ends = (0, head_blocks, len(blocks) - tail_blocks, len(blocks))
    first, between, last = (
        _backbone(backbone, anatomy, start, end) for start, end in itertools.pairwise(ends)
    )
    whole = _shallow(model)
    setattr(whole, prefix, last)
    whole.config = last.config
    place, name = f"{prefix}.", anatomy.blocks
    return Parts(
        Head(first, place, name, ends[0]),
        Middle(between, place, name, ends[1]),
        Tail(whole, "", f"{place}{name}", ends[2]),
    )


def _backbone(whole: Any, anatomy: Anatomy, start: int, end: int) -> Any:
    """The backbone with the blocks from `start` to `end` alone."""
    part = _shallow(whole)
    blocks = submodule(whole, anatomy.blocks)
    mine = nn.ModuleList(blocks[start:end])
    renumber(mine)
    for name in _above(anatomy.blocks):
        replace(part, name, _shallow(submodule(whole, name)))
    replace(part, anatomy.blocks, mine)
    if start > 0:
        for name, stand_in in anatomy.before:
            replace(part, name, stand_in())
    if end < len(blocks):
        for name, other in anatomy.after:
            replace(part, name, other() if other else None)
    part.config = config_of(whole.config, start, end)
    for name in _above(anatomy.blocks):
        submodule(part, name).config = part.config
    return part


def config_of(whole: Any, start: int, end: int) -> Any:
    """The configuration of a model of the blocks from `start` to `end` alone."""
    config = copy.deepcopy(whole)
    config.num_hidden_layers = end - start
    if getattr(whole, "layer_types", None) is not None:
        config.layer_types = list(whole.layer_types[start:end])
    return config


def _above(name: str) -> list[str]:
    """Dotted names of the modules around a dotted name, outermost first."""
    words = name.split(".")[:-1]
    return [".".join(words[: count + 1]) for count in range(len(words))]


def _shallow(module: Any) -> Any:
    """A module of its own that holds the same modules, parameters and buffers."""
    twin = copy.copy(module)
    for kept in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[kept] = dict(module.__dict__[kept])
    return twin
