"""Parts read from a folder compute what the whole does, and read nothing that is not theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from models.section import ConfigError
from models.split.load import SERVER, SITE, Cuts, PartName, load_parts, write_parts
from tests.models.split.families import batch, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CUTS = Cuts(1, 2)


def run(parts: Mapping[PartName, nn.Module], family: str) -> torch.Tensor:
    given = batch(family)
    mask = given["attention_mask"]
    logits: torch.Tensor = parts["tail"](
        parts["middle"](parts["head"](given["input_ids"], mask), mask), mask
    )
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "glm4"])
def test_parts_from_a_folder_are_the_whole(family: str, tied: bool, tmp_path: Path) -> None:
    whole = tiny(family, tie_word_embeddings=tied)
    whole.save_pretrained(tmp_path / "whole", max_shard_size="20KB")  # several files
    site = load_parts(tmp_path / "whole", SITE, CUTS)
    server = load_parts(tmp_path / "whole", SERVER, CUTS)
    assert list(server) == ["middle"]
    assert torch.equal(run({**site, **server}, family), whole(**batch(family)).logits)
    embedding = site["head"].model.get_input_embeddings().weight
    assert (site["tail"].model.get_output_embeddings().weight is embedding) == tied

    places = write_parts(tmp_path / "whole", tmp_path / "parts", CUTS)
    own = load_parts(places["site"], SITE, CUTS) | load_parts(places["server"], SERVER, CUTS)
    assert torch.equal(run(own, family), whole(**batch(family)).logits)
    with pytest.raises(ConfigError, match=r"Expected '\S+' in .*site', got no such tensor"):
        load_parts(places["site"], SERVER, CUTS)


def test_nothing_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path)
    read: list[str] = []

    class Spy:
        def __init__(self, file: object) -> None:
            self.file = file

        def __enter__(self) -> Spy:
            self.file = self.file.__enter__()  # type: ignore[attr-defined]
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)  # type: ignore[attr-defined]

        def keys(self) -> list[str]:
            return list(self.file.keys())  # type: ignore[attr-defined]

        def get_tensor(self, key: str) -> torch.Tensor:
            read.append(key)
            return self.file.get_tensor(key)  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr("models.split.load.safe_open", lambda *given: Spy(safe_open(*given)))
    load_parts(tmp_path, SERVER, CUTS)
    assert read and all(key.startswith("model.layers.1.") for key in read)
    read.clear()
    load_parts(tmp_path, SITE, CUTS)
    assert {key.split(".")[2] for key in read if "layers" in key} == {"0", "2", "3"}


def test_a_new_class_head_comes_from_the_seed(tmp_path: Path) -> None:
    whole = tiny("bert")
    whole.base_model.save_pretrained(tmp_path)
    cuts = Cuts(1, 1, "classification", 3)
    first, again, other = (
        load_parts(tmp_path, SITE, cuts, seed=seed)["tail"] for seed in (1, 1, 2)
    )
    weights = [part.model.classifier.weight for part in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].shape == (3, 32) and bool(weights[0].any())
    assert torch.equal(first.model.bert.pooler.dense.weight, whole.base_model.pooler.dense.weight)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model that transformers knows"):
        load_parts(tmp_path, SITE, CUTS)
    tiny("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"Expected \*\.safetensors weights .* got none"):
        load_parts(tmp_path, SITE, CUTS)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"Expected safetensors in .*: .*copy it again"):
        load_parts(tmp_path, SITE, CUTS)
    write_to = tmp_path / "out"
    (write_to / "server").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"Expected no folder .*server' yet"):
        write_parts(tmp_path, write_to, CUTS)
