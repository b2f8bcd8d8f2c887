"""Text across the cut is the joined model's, and the server's caches are bounded and freed."""

from __future__ import annotations

import gc
import hashlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GenerationConfig

from models.section import ConfigError
from models.split.adapter import load_adapter, read_settings
from models.split.generate import MiddleGeneration, ends_of, generate, greedy, sampling
from models.split.link import FrameLink, Limits
from models.split.load import SERVER, SITE, Cuts, PartName, load_parts
from models.split.messages import Kind, Message
from models.split.step import SplitError
from tests.models.split.families import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = Limits(40, 32, "fp32")
MODEL = hashlib.sha256(b"model").hexdigest()
PROMPT = torch.tensor([[1, 9, 33, 4, 60]])


def adapted(family: str, folder: Path, **keys: Any) -> PeftModel:
    """A model saved in `folder/model`, and its adapter in `folder/adapter` that changes it."""
    whole = tiny(family, **keys)
    whole.save_pretrained(folder / "model")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        settings = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
        joined = get_peft_model(whole, settings)
    joined.save_pretrained(str(folder / "adapter"))
    return joined.eval()


def parts_of(folder: Path, wanted: tuple[PartName, ...]) -> dict[PartName, Any]:
    settings = read_settings(folder / "adapter")
    parts = load_parts(folder / "model", wanted, Cuts(1, 2), payload=settings)
    for part in parts.values():
        load_adapter(part, folder / "adapter")
    return dict(parts)


def written(folder: Path, *, most: int = 12, **how: Any) -> list[int]:
    service = MiddleGeneration(parts_of(folder, SERVER)["middle"], MODEL, LIMITS)
    site = parts_of(folder, SITE)
    with FrameLink(lambda frames: service.serve("site", frames), LIMITS) as link:
        return list(
            generate(site["head"], site["tail"], link, PROMPT, model=MODEL, most=most, **how)
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "glm", "mistral"])
def test_text_is_that_of_the_joined_model(family: str, tmp_path: Path) -> None:
    window = {"sliding_window": 6} if family == "mistral" else {}
    joined = adapted(family, tmp_path, **window)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 12,
                             "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    expected = joined.generate(PROMPT, do_sample=False, **given)[0, 5:].tolist()
    with joined.disable_adapter():
        assert joined.generate(PROMPT, do_sample=False, **given)[0, 5:].tolist() != expected
    assert written(tmp_path) == expected
    with torch.random.fork_rng():
        torch.manual_seed(7)
        drawn = joined.generate(PROMPT, do_sample=True, temperature=1.5, **given)[0, 5:].tolist()
    assert written(tmp_path, choose=sampling(1.5, 7)) == drawn != expected


def test_a_text_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    adapted("llama", tmp_path)
    whole = written(tmp_path)
    assert len(whole) == 12
    first = whole.index(whole[4]) + 1
    assert written(tmp_path, ends={whole[4]}) == whole[:first]
    tail = parts_of(tmp_path, SITE)["tail"]
    GenerationConfig(eos_token_id=[4, 5]).save_pretrained(tmp_path / "model")
    assert ends_of(tmp_path / "model", tail) == {4, 5}
    (tmp_path / "model" / "generation_config.json").unlink()
    assert ends_of(tmp_path / "model", tail) == {2}


def test_each_text_of_a_stream_starts_anew_and_its_cache_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted("llama", tmp_path)
    kept: list[weakref.ref[DynamicCache]] = []

    def counted(**given: Any) -> DynamicCache:
        cache = DynamicCache(**given)
        kept.append(weakref.ref(cache))
        return cache

    site = parts_of(tmp_path, SITE)
    service = MiddleGeneration(parts_of(tmp_path, SERVER)["middle"], MODEL, LIMITS)
    monkeypatch.setattr("models.split.generate.DynamicCache", counted)
    with FrameLink(lambda frames: service.serve("site", frames), LIMITS) as link:
        first, second = (
            list(generate(site["head"], site["tail"], link, PROMPT, model=MODEL, most=4))
            for _ in range(2)
        )
        assert first == second
    gc.collect()
    assert len(kept) == 6 and not any(cache() for cache in kept)


def message(kind: Kind, key: int, tokens: int = 0, rows: int = 1) -> bytes:
    values = torch.zeros(rows, tokens, 32) if tokens else None
    return Message(kind, key, values).encode("fp32")


OPEN = message(Kind.OPEN, int(MODEL[:16], 16))


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([message(Kind.OPEN, 7)], r"model and adapter \w{16} of 'ann', got 0{15}7; give both"),
        ([message(Kind.GENERATE, 0, 3)], "Expected OPEN and then GENERATE of 'ann', got GENERATE"),
        ([OPEN, message(Kind.BACKWARD, 0, 3)], "Expected OPEN and then GENERATE .* got BACKWARD"),
        ([OPEN, message(Kind.GENERATE, 1, 3)], "go on at token 0, got 1 at token 1"),
        ([OPEN, message(Kind.GENERATE, 0, 3, rows=2)], "go on at token 0, got 2 at token 0"),
        (
            [OPEN, message(Kind.GENERATE, 0, 39), message(Kind.GENERATE, 39, 2)],
            "a text of at most 40 tokens of 'ann', got more",
        ),
    ],
)
def test_what_is_no_text_ends_the_stream(
    frames: list[bytes], expected: str, tmp_path: Path
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    middle: Any = load_parts(tmp_path, SERVER, Cuts(1, 2))["middle"]
    answers = MiddleGeneration(middle, MODEL, LIMITS).serve("ann", iter(frames))
    for _ in frames[1:]:
        next(answers)
    with pytest.raises(SplitError, match=expected):
        next(answers)


def test_sampling_goes_by_its_seed_and_takes_likely_tokens() -> None:
    logits = torch.arange(100.0) / 10
    drawn = [[sampling(1.0, seed)(logits) for _ in range(1)] for seed in (1, 1, 2, 3, 4, 5)]
    assert drawn[0] == drawn[1] and len({tuple(tokens) for tokens in drawn}) > 1
    choose = sampling(100.0, 0)
    assert min(choose(logits) for _ in range(300)) >= 50
    assert greedy(logits) == 99


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    adapted("llama", tmp_path)
    with pytest.raises(ConfigError, match="an adapter in PEFT's format"):
        read_settings(tmp_path / "model")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file(tensors | {name: torch.zeros(2, 2)}, path)
    with pytest.raises(ConfigError, match=r"up_proj.lora_A.weight' of shape \(3, 32\) .* \(2, 2\)"):
        parts_of(tmp_path, SERVER)
    assert parts_of(tmp_path, SITE)  # which does not read it
    tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"up_proj.lora_A.weight' of shape .* got none; name"):
        parts_of(tmp_path, SERVER)
    path.write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"Expected safetensors in .*adapter_model"):
        parts_of(tmp_path, SITE)
    get_peft_model(
        tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    ).save_pretrained(str(tmp_path / "dora"))
    with pytest.raises(ConfigError, match="an adapter of plain LoRA"):
        read_settings(tmp_path / "dora")
