"""The self-check passes what is exact, whatever the payload, and refuses what is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.payload import Payload
from models.section import ConfigError
from privacy import persample
from privacy.ghost import Ghost
from privacy.persample import Hooks, Inputs, Measured, Microbatch, PerSampleError, Sums, attached
from privacy.selfcheck import METHODS, check, choose
from tests.privacy.conftest import Payloads

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = ("ghost", "hooks", "microbatch")
EXACT = {
    ("lora", "llama", "causal-lm"): ALL,
    ("lora", "gpt2", "causal-lm"): ALL,
    ("lora", "bert", "classification"): ALL,
    ("soft-prompt", "llama", "causal-lm"): ALL,
    ("soft-prompt", "bert", "classification"): ALL,
    ("prefix", "llama", "causal-lm"): ALL,
    ("prefix", "llama", "classification"): ALL,
    ("prefix", "bert", "classification"): ALL,
    ("adapter", "llama", "causal-lm"): ("microbatch",),
    ("full", "llama", "causal-lm"): ALL,
    ("full", "gpt2", "causal-lm"): ALL,  # shared embeddings, positions for all rows at once
    ("full", "bert", "classification"): ALL,
}


@pytest.mark.parametrize("case", list(EXACT), ids=" ".join)
def test_which_methods_are_exact(payload_of: Payloads, case: tuple[str, str, str]) -> None:
    payload = payload_of(*case)
    passed = []
    for name, kind in METHODS.items():
        try:
            check(payload, kind, case[2])
            passed.append(name)
        except PerSampleError:
            pass
    assert tuple(passed) == EXACT[case]
    assert choose(payload, "auto", case[2], "float32") == passed[0]


@pytest.mark.parametrize("method", ["hooks", "ghost"])
def test_a_method_that_does_not_fit_is_refused_with_the_remedy(
    payload_of: Payloads, method: str
) -> None:
    message = rf"payload\.kind='adapter'.*{method}: .*privacy\.per-sample='auto'"
    with pytest.raises(ConfigError, match=message):
        choose(payload_of("adapter"), method, "causal-lm", "float32")


class Careless(Hooks):
    """Opacus' hooks as they are commonly used, with whatever shapes they give."""

    def _samples(self) -> Sums:
        self._rows = len(next(iter(self._parameters.values())).grad_sample)  # type: ignore[attr-defined]
        return super()._samples()


@pytest.mark.parametrize("model_task", [("llama", "causal-lm"), ("bert", "classification")])
def test_peft_s_own_prompt_tuning_is_refused(
    payload_of: Payloads, monkeypatch: pytest.MonkeyPatch, model_task: tuple[str, str]
) -> None:
    """It embeds the virtual tokens once for a batch: one gradient for all rows, not clipped."""
    payload = payload_of("soft-prompt", *model_task)
    monkeypatch.setattr(persample, "prompts_by_row", lambda module: nullcontext())
    for name in ("hooks", "ghost"):
        with pytest.raises(ConfigError, match="once for several rows"):
            choose(payload, name, model_task[1], "float32")
    if model_task[1] == "causal-lm":  # by its numbers as well, where shapes are let pass
        with pytest.raises(PerSampleError, match=r"gradient of (norm .* for )?record 1 of 2"):
            check(payload, Careless, model_task[1])
    assert choose(payload, "auto", model_task[1], "float32") == "microbatch"


class Lying(Microbatch):
    """Exact, but for one lie."""

    physical = None
    lie: Callable[[Measured], Measured] = staticmethod(lambda measured: measured)
    strength = 1.0

    def __init__(self, payload: Payload, precision: str) -> None:
        super().__init__(payload, precision)
        self._rows: list[Sums] = []

    def measure(self, inputs: Inputs) -> Measured:
        found = []
        self._rows = []
        for row in range(len(inputs["labels"])):
            found.append(super().measure({n: v[row : row + 1] for n, v in inputs.items()}))
            self._rows.append(dict(self._gradients))
        whole = Measured(
            torch.cat([one.losses for one in found]), torch.cat([one.norms for one in found])
        )
        return type(self).lie(whole)

    def add(self, factors: Tensor, sums: Sums) -> None:
        for factor, gradients in zip(factors, self._rows, strict=True):
            for name, gradient in gradients.items():
                sums[name] += self.strength * factor * gradient


def lying(**lies: Any) -> type[Lying]:
    return type("Liar", (Lying,), lies)


def test_each_lie_is_found(payload_of: Payloads) -> None:
    payload = payload_of("lora")
    check(payload, lying(), "causal-lm")
    swapped = staticmethod(lambda m: Measured(m.losses, m.norms.flip(0)))
    short = staticmethod(lambda m: Measured(m.losses, 0.99 * m.norms))
    nan = staticmethod(lambda m: Measured(m.losses, m.norms * torch.nan))
    for liar in (lying(lie=swapped), lying(lie=short), lying(lie=nan), lying(strength=1.01)):
        with pytest.raises(PerSampleError, match="record 1 of 2"):
            check(payload, liar, "causal-lm")


class MixedRows(nn.Module):
    """Batch normalisation, which lets each row see the others."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden - hidden.mean((0, 1)))


@pytest.mark.parametrize("method", ["hooks", "ghost"])
def test_rows_that_see_each_other_are_refused(payload_of: Payloads, method: str) -> None:
    payload = payload_of("lora")
    decoder = payload.module.base_model.model.model
    decoder.norm = MixedRows(decoder.norm)
    with pytest.raises(PerSampleError, match="record 1 of 2"):
        check(payload, METHODS[method], "causal-lm")


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", ["lora", "soft-prompt", "full"])
def test_nothing_stays_behind(payload_of: Payloads, kind: str, method: str) -> None:
    payload = payload_of(kind)

    def traces() -> list[object]:
        modules = list(payload.module.named_modules())
        hooks = [len(m._forward_hooks) + len(m._backward_hooks) for _, m in modules]
        before = sum(len(m._forward_pre_hooks) for _, m in modules)
        attributes = [sorted(vars(m)) for _, m in modules]
        of_parameters = [sorted(vars(p)) for p in payload.parameters.values()]
        return [list(payload.module.state_dict()), hooks, before, attributes, of_parameters]

    found, weights = traces(), payload.layout.flatten(payload.select())
    check(payload, METHODS[method], "causal-lm")
    assert traces() == found
    assert torch.equal(payload.layout.flatten(payload.select()), weights)
    assert all(p.grad is None for p in payload.parameters.values())
    assert not payload.module.training


def test_a_start_at_zero_does_not_hide_a_wrong_gradient(payload_of: Payloads) -> None:
    """With B = 0 the gradients of A vanish; the check lends B values, and takes them back."""
    payload = payload_of("lora")
    zeros = {n: t * 0 if "lora_B" in n else t for n, t in payload.select().items()}
    payload.load(zeros)

    class WithoutA(Microbatch):
        def add(self, factors: Tensor, sums: Sums) -> None:
            self._gradients = {n: g for n, g in self._gradients.items() if "lora_A" not in n}
            super().add(factors, sums)

    with pytest.raises(PerSampleError, match="lora_A"):
        check(payload, WithoutA, "causal-lm")
    assert torch.equal(payload.layout.flatten(payload.select()), payload.layout.flatten(zeros))


@pytest.mark.parametrize("method", METHODS)
def test_the_model_s_own_dropout_does_not_disturb_the_check(
    payload_of: Payloads, method: str
) -> None:
    payload = payload_of("full", "bert", "classification", dropped=0.5)
    check(payload, METHODS[method], "classification")


def test_dropout_does_not_disturb_the_check(payload_of: Payloads) -> None:
    payload = payload_of("lora", "gpt2", dropout=0.5)
    check(payload, METHODS["ghost"], "causal-lm")
    payload.module.train()
    row = {"input_ids": torch.arange(3, 9)[None], "labels": torch.arange(3, 9)[None]}
    with attached(payload, METHODS["ghost"], "float32") as method:  # it is on in training
        assert method.measure(row).norms != method.measure(row).norms


@pytest.mark.parametrize("kind", ["lora", "soft-prompt", "full"])
def test_in_low_precision_every_record_is_alone(payload_of: Payloads, kind: str) -> None:
    """In a batch its rounding would move the gradients of others."""
    payload = payload_of(kind)
    assert choose(payload, "auto", "causal-lm", "bfloat16") == "microbatch"
    for method in ("ghost", "hooks"):
        with pytest.raises(ConfigError, match=rf"{method}: .*train\.precision='float32'"):
            choose(payload, method, "causal-lm", "bfloat16")


def test_a_base_model_in_few_bits_takes_every_record_alone(payload_of: Payloads) -> None:
    payload = payload_of("lora")
    trained = payload.parameters.values()
    for parameter in payload.module.parameters():
        if not any(parameter is one for one in trained):
            parameter.data = parameter.data.bfloat16()
    assert choose(payload, "auto", "causal-lm", "float32") == "microbatch"


def test_layers_that_opacus_copies_do_not_bring_the_whole_model_with_them(
    payload_of: Payloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook on a copied layer would be copied too, and all that it holds."""

    def copied(self: Ghost, memo: object) -> Ghost:
        raise AssertionError("the method was copied, with the model")

    monkeypatch.setattr(Ghost, "__deepcopy__", copied, raising=False)
    payload = payload_of("full")  # its norms have no rule of their own in Opacus
    check(payload, Ghost, "causal-lm")
    assert not any("ft_compute_sample_grad" in vars(m) for m in payload.module.modules())


def test_a_layer_that_opacus_cannot_copy_is_refused_and_nothing_is_left(
    payload_of: Payloads,
) -> None:
    payload = payload_of("full")
    norms = [m for name, m in payload.module.named_modules() if name.endswith("norm")]
    norms[-1].register_buffer("steps", torch.zeros(1))
    with pytest.raises(PerSampleError, match=r"Opacus cannot copy a layer.*buffers"):
        check(payload, Ghost, "causal-lm")
    assert not any("ft_compute_sample_grad" in vars(m) for m in payload.module.modules())
    assert not any(m._forward_hooks for m in payload.module.modules())


def test_recomputed_activations_are_counted_once(payload_of: Payloads) -> None:
    payload = payload_of("lora")
    payload.module.get_base_model().gradient_checkpointing_enable()
    payload.module.get_base_model().enable_input_require_grads()
    check(payload, METHODS["ghost"], "causal-lm")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lora", {"options": '{"use_dora": true}'}),
        ("lora", {"target_modules": "embed_tokens,q_proj"}),
        ("ia3", {}),
        ("loha", {}),
    ],
)
def test_what_no_hook_can_see_is_found_out(
    payload_of: Payloads, kind: str, options: dict[str, str]
) -> None:
    """Parameters that are used past their modules: only one record at a time is right."""
    assert choose(payload_of(kind, **options), "auto", "causal-lm", "float32") == "microbatch"
