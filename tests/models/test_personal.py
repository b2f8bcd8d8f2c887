"""Parts of a payload that stay at the site: what an entry matches, and what then travels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from models.base import Base
from models.layout import LayoutError
from models.payload import Payload
from models.personal import personal_names
from models.section import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

Attach = Callable[..., tuple[Base, Payload]]
NAMES = (
    "base.layers.0.q_proj.lora_A.weight",
    "base.layers.0.q_proj.lora_B.weight",
    "base.layers.1.v_proj.lora_A.weight",
    "base.embed.lora_embedding_B",
    "base.score.weight",
)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", ()),
        ("lora_B", (1, 3)),
        ("lora_A", (0, 2)),
        ("head", (4,)),
        (" q_proj , head ", (0, 1, 4)),
        ("q_proj.lora_B", (1,)),
        ("layers.1", (2,)),
    ],
)
def test_entries_match_whole_parts_of_names(listed: str, expected: tuple[int, ...]) -> None:
    assert personal_names(NAMES, listed, ["score"]) == {NAMES[at] for at in expected}


@pytest.mark.parametrize("entry", ["lora", "proj", "lora_b", "."])
def test_an_entry_that_matches_nothing_lists_what_can_be(entry: str) -> None:
    choices = r"embed, head, layers, lora_A, lora_B, lora_embedding_B, q_proj, score, v_proj"
    with pytest.raises(ConfigError, match=rf"Unknown payload\.personal entry .*{choices}"):
        personal_names(NAMES, entry, ["score"])


def test_without_a_new_head_there_is_none_to_keep() -> None:
    with pytest.raises(ConfigError, match=r"Unknown payload\.personal entry 'head'"):
        personal_names(NAMES, "head")


@pytest.mark.parametrize("listed", ["base", "layers,embed,score", "lora_A,lora_B,head"])
def test_something_must_travel(listed: str) -> None:
    with pytest.raises(ConfigError, match=r"leave something that travels.*name less"):
        personal_names(NAMES, listed, ["score"])


def test_a_payload_falls_into_two_parts(attached: Attach) -> None:
    whole = attached("lora")[1]
    _, payload = attached("lora", personal="lora_B")
    travels, stays = payload.select(), payload.select_personal()
    assert all(".lora_A." in name for name in travels) and all(".lora_B." in n for n in stays)
    assert travels.keys() | stays.keys() == set(whole.layout.names) == payload.parameters.keys()
    assert payload.layout.size + payload.personal_layout.size == whole.layout.size
    assert payload.layout.digest != whole.layout.digest
    # Start values are those of a payload that is shared as a whole.
    everything = travels | stays
    assert all(torch.equal(everything[name], t) for name, t in whole.select().items())


def test_each_part_is_loaded_by_itself(attached: Attach) -> None:
    _, payload = attached("lora", personal="lora_B")
    travels, stays = payload.select(), payload.select_personal()
    payload.load_personal({name: tensor + 1 for name, tensor in stays.items()})
    assert all(torch.equal(payload.select()[name], t) for name, t in travels.items())
    assert all(torch.equal(payload.select_personal()[n], t + 1) for n, t in stays.items())
    assert all(torch.equal(payload.personal_start[n], t) for n, t in stays.items())
    with pytest.raises(LayoutError, match="missing"):
        payload.load(stays)
    with pytest.raises(LayoutError, match="missing"):
        payload.load_personal(travels)


def test_a_new_head_may_stay(attached: Attach) -> None:
    _, payload = attached("lora", model="bert", task="classification", personal="head")
    assert payload.personal and all("classifier" in name for name in payload.personal)
    assert not any("classifier" in name for name in payload.layout.names)


def test_a_payload_without_personal_parts_keeps_nothing(attached: Attach) -> None:
    _, payload = attached("soft-prompt")
    assert (payload.personal_layout.size, payload.select_personal()) == (0, {})
    payload.load_personal({})
