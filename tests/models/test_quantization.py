"""A base model that bitsandbytes quantised is smaller, and trained through its adapter alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.base import load
from models.batches import Batches
from models.config import ModelConfig, PayloadConfig, TrainConfig
from models.payload import attach
from models.section import ConfigError
from models.text import Causal
from models.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(folder: Path, quantization: str) -> ModelConfig:
    return ModelConfig.model_validate({"name": str(folder), "quantization": quantization})


@pytest.fixture
def wide(
    tmp_path: Path, tiny_models: Mapping[str, Path], tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A model whose layers are wide enough for the kernels that compute in 4 bits on a CPU."""
    shape = LlamaConfig.from_pretrained(
        tiny_models["llama"],
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=1,
        head_dim=64,
    )
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("quantization", "bits"), [("int8", 8), ("int4", 4)])
def test_lora_trains_on_quantised_weights(wide: Path, quantization: str, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="needs ./scripts/setup quantization")
    plain = load(settings(wide, "none"))
    base = load(settings(wide, quantization))
    assert base.digest == plain.digest  # that of the files
    name = "model.layers.0.mlp.up_proj"
    small = base.model.get_submodule(name).weight
    assert small.nbytes * 8 == plain.model.get_submodule(name).weight.numel() * bits

    payload = attach(base.model, PayloadConfig(rank=4), tokenizer=base.tokenizer)
    frozen = small.detach().clone()
    ids = torch.randint(3, 270, (24,), generator=torch.Generator().manual_seed(0))
    batches = Batches(
        [Causal(ids, ids.clone())], batch_size=1, seed=0, pad_id=0, packing=False, max_length=32
    )
    config = TrainConfig(precision="float32")
    first, later = (
        train(payload, batches.take(0, 10), config, steps=10, learning_rate=1e-2).loss
        for _ in range(2)
    )
    assert later < first - 0.1
    assert torch.equal(small, frozen)
    assert all(tensor.dtype == torch.float32 for tensor in payload.select().values())


def test_all_of_this_with_the_package_aside() -> None:
    aside = Path(sys.prefix) / "aside"
    if not (aside / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not in .venv/aside: run ./scripts/setup dev")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o",
         "addopts=--import-mode=importlib", __file__, "-k", "lora_trains"],
        env=os.environ | {"PYTHONPATH": str(aside)}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout[-4000:]


def test_without_the_package_the_error_says_how_to_get_it(
    tiny_models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(ConfigError, match=r"bitsandbytes .*'int4', got none; run \./scripts/setup"):
        load(settings(tiny_models["llama"], "int4"))
