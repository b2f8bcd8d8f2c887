"""Virtual tokens embedded for every row: the same numbers, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from models.losses import row_losses
from models.prompts import prompts_by_row
from models.text import IGNORED
from tests.models.conftest import Attach

ROWS = torch.arange(3, 19).reshape(2, 8)


@pytest.mark.parametrize("kind", ["soft-prompt", "p-tuning"])
def test_the_numbers_stay_and_the_embedding_sees_every_row(attached: Attach, kind: str) -> None:
    _, payload = attached(kind)
    seen: list[tuple[int, ...]] = []
    encoder = payload.module.prompt_encoder["default"]
    handle = encoder.register_forward_hook(lambda _, given, out: seen.append(tuple(given[0].shape)))
    payload.module.eval()
    before = payload.module(input_ids=ROWS).logits
    with prompts_by_row(payload.module):
        within = payload.module(input_ids=ROWS).logits
    after = payload.module(input_ids=ROWS).logits
    handle.remove()
    assert torch.allclose(before, within, atol=1e-6)
    assert torch.equal(before, after)
    assert seen == [(1, 4), (2, 4), (1, 4)]
    assert "get_prompt" not in vars(payload.module)


def test_other_payloads_are_left_alone(attached: Attach) -> None:
    for kind in ("lora", "prefix"):
        _, payload = attached(kind)
        with prompts_by_row(payload.module):
            assert "get_prompt" not in vars(payload.module)


@pytest.mark.parametrize("kind", ["lora", "soft-prompt"])
def test_a_row_s_loss_is_the_model_s_own_for_it_alone(attached: Attach, kind: str) -> None:
    _, payload = attached(kind)
    payload.module.eval()
    labels = ROWS.clone()
    labels[:, 0] = IGNORED
    labels[0, :6] = IGNORED
    together = row_losses(payload.module, {"input_ids": ROWS, "labels": labels})
    for row in range(2):
        alone = payload.module(input_ids=ROWS[row][None], labels=labels[row][None]).loss
        assert together[row].item() == pytest.approx(alone.item(), rel=1e-5)
    nothing = torch.full_like(labels, IGNORED)
    assert row_losses(payload.module, {"input_ids": ROWS, "labels": nothing}).tolist() == [0, 0]


def test_a_class_has_a_loss_of_its_own(attached: Attach) -> None:
    _, payload = attached("lora", model="bert", task="classification")
    payload.module.eval()
    labels = torch.tensor([2, 0])
    together = row_losses(payload.module, {"input_ids": ROWS, "labels": labels})
    whole = payload.module(input_ids=ROWS, labels=labels).loss
    assert together.mean().item() == pytest.approx(whole.item(), rel=1e-5)
