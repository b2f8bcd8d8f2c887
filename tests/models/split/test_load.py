"""Parts read from a folder compute what the whole does, and read nothing that is not theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from models.section import ConfigError
from models.split.load import (
    RECORD,
    SERVER,
    SITE,
    Cuts,
    PartName,
    Task,
    digest_of_parts,
    load_parts,
    write_parts,
)
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

    monkeypatch.setattr("models.split.checkpoint.safe_open", lambda *given: Spy(safe_open(*given)))
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


@pytest.mark.parametrize("lacks", ["bert.pooler.dense", "bert.embeddings.word_embeddings"])
def test_what_is_neither_trained_nor_saved_is_not_drawn(lacks: str, tmp_path: Path) -> None:
    whole = tiny("bert")
    kept = {name: t for name, t in whole.state_dict().items() if not name.startswith(lacks)}
    whole.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(
        ConfigError, match=f"Expected '{lacks}.*' in .*that lacks its classifi.*ead"
    ):
        load_parts(tmp_path, SITE, Cuts(1, 1, "classification"))


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_one_digest_for_the_whole_and_for_both_sides(family: str, tmp_path: Path) -> None:
    task: Task = "classification" if family == "bert" else "causal-lm"
    cuts = Cuts(1, 2, task)
    tiny(family).save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    places = write_parts(tmp_path / "whole", tmp_path, cuts)
    whole = digest_of_parts(tmp_path / "whole", cuts)
    assert {digest_of_parts(folder, cuts) for folder in places.values()} == {whole}
    # Where it came from does not count, what it computes does.
    config = tmp_path / "whole" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"_name_or_path": "elsewhere"}))
    assert digest_of_parts(tmp_path / "whole", cuts) == whole
    config.write_text(json.dumps(told | {"layer_norm_eps": 0.5, "rms_norm_eps": 0.5}))
    assert digest_of_parts(tmp_path / "whole", cuts) != whole


def test_another_model_or_cut_has_another_digest(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny("llama", seed).save_pretrained(tmp_path / str(seed))
    found = [digest_of_parts(tmp_path / "0", Cuts(1, tail)) for tail in (1, 2)]
    found += [digest_of_parts(tmp_path / str(seed), CUTS) for seed in (0, 1)]
    assert len(set(found)) == 3  # the second and third are the same


def test_another_tokenizer_has_another_digest_and_is_refused_in_parts(tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    for folder, words in ((whole, b"a b"), (other, b"b a")):
        tiny("llama").save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes(words)
    assert digest_of_parts(whole, CUTS) != digest_of_parts(other, CUTS)
    places = write_parts(whole, tmp_path / "parts", CUTS)
    assert not (places["server"] / "tokenizer.json").exists()
    found = {digest_of_parts(folder, CUTS) for folder in places.values()}
    assert found == {digest_of_parts(whole, CUTS)}
    for name in ("tokenizer.json", "vocab.txt"):  # changed, and added
        (places["site"] / name).write_bytes(b"b a")
        with pytest.raises(
            ConfigError, match=r"Expected the tokenizer in .*site' as the model was"
        ):
            digest_of_parts(places["site"], CUTS)
        (places["site"] / "tokenizer.json").write_bytes(b"a b")


def test_parts_that_were_changed_are_refused(tmp_path: Path) -> None:
    tiny("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    places = write_parts(tmp_path, tmp_path / "parts", CUTS)
    with pytest.raises(ConfigError, match=r"parts cut as 1/1 for causal-lm .* got 1/2 for causal"):
        digest_of_parts(places["site"], Cuts(1, 1))
    for place, name in (("site", "tail"), ("server", "middle")):
        path = places[place] / f"{name}.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, path)
        with pytest.raises(ConfigError, match=f"Expected the {name} in .* as it was cut, got othe"):
            digest_of_parts(places[place], CUTS)
    (places["site"] / "tail.safetensors").unlink()
    assert digest_of_parts(places["site"], CUTS) == digest_of_parts(tmp_path, CUTS)
    for content in (b"{", b'{"head-blocks": 1}'):
        (places["server"] / RECORD).write_bytes(content)
        with pytest.raises(ConfigError, match=r"Expected parts.json as ./scripts/split cut writes"):
            digest_of_parts(places["server"], CUTS)
    (places["server"] / RECORD).unlink()
    with pytest.raises(ConfigError, match=r"Expected the head of the model in .*server', got none"):
        digest_of_parts(places["server"], CUTS)


def test_a_site_is_not_handed_weights_of_another_format(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "whole")
    for name in ("pytorch_model.bin", "tokenizer.json"):
        (tmp_path / "whole" / name).write_bytes(b"1")
    site = write_parts(tmp_path / "whole", tmp_path, CUTS)["site"]
    assert (site / "tokenizer.json").exists() and not (site / "pytorch_model.bin").exists()
