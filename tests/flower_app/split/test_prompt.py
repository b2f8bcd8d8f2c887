"""Whole runs of split learning that train a soft prompt at the sites, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
from safetensors.torch import load_file

from flower_app import generate
from flower_app.config import parse
from flower_app.split.site import frame_bytes, limits
from models.section import ConfigError
from models.split.load import Cuts, write_parts
from tests.flower_app.nodes import Nodes
from tests.flower_app.runs import bytes_below, deploy, rows, simulate
from tests.flower_app.split.test_runs import SPLIT, joined

PROMPT = SPLIT | {"split__head": "soft-prompt", "split__middle": "none", "split__tail": "none"}


def test_a_soft_prompt_is_one_adapter_for_the_whole_model(
    nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = PROMPT | {"train__learning_rate": 0.3, "train__grad_accumulation": 2}
    folder, _ = simulate(nodes, "prompt", keys)
    (prompt,) = load_file(folder / "adapter" / "adapter_model.safetensors").values()
    assert prompt.shape == (3, 32)
    first, last = rows(folder, "evaluation")[0], rows(folder, "evaluation")[-1]
    assert last["loss"] < first["loss"] - 0.01
    assert joined(nodes, folder, **keys) == pytest.approx(last["loss"], abs=1e-5)
    capsys.readouterr()
    asked = ["--run", str(folder), "--prompt", "the cat", "--max-new-tokens", "3"]
    assert generate.main([*asked, "--temperature", "0"]) == 0
    assert "the cat" in capsys.readouterr().out


def test_each_side_needs_its_own_folder_only(nodes: Nodes) -> None:
    whole, _ = deploy(nodes, "whole", PROMPT)
    parts = write_parts(nodes.model, nodes.folder / "parts", Cuts())
    nodes.model = parts["site"]
    nodes.keys["model.name"] = str(parts["server"])
    apart, _ = deploy(nodes, "apart", PROMPT)
    assert bytes_below(apart / "adapter") == bytes_below(whole / "adapter")
    with pytest.raises(ConfigError, match=r"payload.init='text', which it starts from"):
        deploy(nodes, "text", PROMPT, payload__init="text", payload__init_text="a cat")


def test_frames_have_room_for_it(nodes: Nodes) -> None:
    plain, longer = (parse(nodes.flat(**keys)) for keys in (SPLIT, PROMPT))
    assert limits(plain, 32).most_tokens == 4 * 32
    assert limits(longer, 32).most_tokens == 4 * (32 + 3)


def test_micro_batches_that_no_message_has_room_for_are_refused(nodes: Nodes) -> None:
    room = parse(nodes.flat(**SPLIT, train__batch_size=16, train__max_length=8190))
    assert 2**30 < frame_bytes(limits(room, 4096)) < 2**31
    longer = parse(nodes.flat(**SPLIT, train__batch_size=16, train__max_length=8192))
    with pytest.raises(ConfigError, match=r"lower train.batch-size .* or train.max-length"):
        frame_bytes(limits(longer, 4096))
    with pytest.raises(ConfigError, match=r"lower train.batch-size .* or train.max-length"):
        simulate(nodes, "longer", SPLIT, train__batch_size=2**22)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split__middle": "lora"}, "Expected split.middle='none' with split.head='soft-prompt'"),
        ({"split__tail": "full"}, "Expected split.tail='none' with split.head='soft-prompt'"),
        (
            {"model__task": "classification", "data__format": "classification"},
            "Expected model.task='causal-lm' with split.head='soft-prompt'",
        ),
        (
            {"payload__options": '{"num_virtual_tokens": 9}'},
            "Expected payload.options='' with split.head='soft-prompt'",
        ),
        ({"strategy__rule": "lora-svd"}, "Expected LoRA factors A and B in the payload"),
    ],
)
def test_what_cannot_be_is_refused(nodes: Nodes, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        simulate(nodes, "wrong", PROMPT, **wrong)
