"""Reading one side's parts of a model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.config import ModelConfig, PayloadConfig
from models.section import ConfigError
from models.split import load as loading
from models.split.base import SplitBase, load
from models.split.config import SplitConfig
from models.split.load import SERVER, SITE, Cuts, write_parts
from tests.models.split.families import tiny


def test_threads_of_a_process_load_one_after_another(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("gpt2", vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    patch, made = loading.init_empty_weights, nn.Module.register_parameter

    @contextmanager
    def slow(**keys: Any) -> Iterator[None]:
        with patch(**keys):
            yield
            time.sleep(0.05)  # longer than it takes another thread to come here

    monkeypatch.setattr(loading, "init_empty_weights", slow)

    def site(_: int = 0) -> SplitBase:
        return load(ModelConfig(name=str(tmp_path)), PayloadConfig(), SplitConfig(), SITE, seed=1)

    alone = dict(site().model.named_parameters())
    with ThreadPoolExecutor(3) as threads:
        found = [dict(base.model.named_parameters()) for base in threads.map(site, range(3))]
    assert nn.Module.register_parameter is made
    for tensors in found:
        assert tensors.keys() == alone.keys()
        assert all(torch.equal(tensor, alone[name]) for name, tensor in tensors.items())


def test_a_server_that_has_the_whole_folder_has_its_tokenizer(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    whole = tmp_path / "whole"
    tiny("gpt2", vocab_size=len(tiny_tokenizer)).save_pretrained(whole)

    def server(folder: Path) -> SplitBase:
        return load(ModelConfig(name=str(folder)), PayloadConfig(), SplitConfig(), SERVER)

    with pytest.raises(ConfigError, match="Expected a tokenizer in the model folder"):
        server(whole)  # its digest would be no site's
    tiny_tokenizer.save_pretrained(whole)
    parts = write_parts(whole, tmp_path, Cuts())
    assert server(parts["server"]).digest == server(whole).digest
