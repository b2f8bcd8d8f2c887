"""A base model is found, checked, hashed and read once, or refused with a reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import LlamaForSequenceClassification, RobertaConfig, RobertaModel

from models.base import Base, BaseCache, context, digest_of, find_folder, load, seeded
from models.config import ModelConfig
from models.section import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tiny_models: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))


def settings(folder: Path, **keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": str(folder), **keys})


def edit_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def weights(base: Base) -> dict[str, torch.Tensor]:
    return dict(base.model.state_dict())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_folder_in_hub_format_is_read_as_it_was_saved(
    tiny_models: Mapping[str, Path], name: str
) -> None:
    base = load(settings(tiny_models[name]))
    assert base.model.config.model_type == name
    assert base.fresh_modules == ()
    assert base.tokenizer.pad_token == "<pad>"
    assert base.tokenizer.decode(base.tokenizer("the cat")["input_ids"]) == "the cat"
    assert base.digest == digest_of(tiny_models[name])
    assert all(weight.dtype == torch.float32 for weight in weights(base).values())


def test_a_path_of_the_site_goes_before_the_configured_name(
    tiny_models: Mapping[str, Path],
) -> None:
    base = load(settings(Path("/not/there")), path=str(tiny_models["gpt2"]))
    assert base.model.config.model_type == "gpt2"


def test_dtype_of_the_frozen_weights(tiny_models: Mapping[str, Path]) -> None:
    base = load(settings(tiny_models["llama"], dtype="bfloat16"))
    assert {weight.dtype for weight in weights(base).values()} == {torch.bfloat16}


def test_gradient_checkpointing_is_switched_on(tiny_models: Mapping[str, Path]) -> None:
    base = load(settings(tiny_models["llama"], gradient_checkpointing=True))
    assert base.model.is_gradient_checkpointing


def test_a_tokenizer_without_padding_pads_with_the_end_of_sequence(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    del stored["pad_token"]
    path.write_text(json.dumps(stored))
    assert load(settings(folder)).tokenizer.pad_token == "</s>"


def write(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "gone",
        shutil.rmtree,
        r"model folder with a config\.json, got '.*'; save .* or name a hub id",
    ),
    ("no config", lambda f: (f / "config.json").unlink(), r"with a config\.json.*save_pretrained"),
    ("not JSON", write("config.json", "{"), r"transformers can read in .*not a valid JSON.*again"),
    ("no type", write("config.json", "{}"), r"model that transformers knows in .*model_type"),
    ("martian", write("config.json", '{"model_type": "martian"}'), r"transformers knows.*martian"),
    ("no tokenizer", no_tokenizer, r"a tokenizer in .*tokenizer\.save_pretrained"),
    ("bad tokenizer", write("tokenizer.json", "{"), r"tokenizer that transformers can read in"),
    (
        "pickled",
        only_pickled,
        r"\*\.safetensors weights.*pickled weights are never loaded: convert",
    ),
    ("cut short", cut_weights, r"transformers can read in .*SafetensorError.*copy it again"),
    ("no heads", lambda f: edit_config(f, num_attention_heads=0), r"transformers can read in"),
    ("wider", lambda f: edit_config(f, hidden_size=32), r"of shape \(.*32.*\) in .*got \(.*16"),
    (
        "deeper",
        lambda f: edit_config(f, num_hidden_layers=3),
        r"whole causal-lm.*none for '.*\.2\.",
    ),
]


@pytest.mark.parametrize(("damage", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_what_is_not_a_model_folder_is_refused_with_the_remedy(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=r"Expected .*" + message):
        load(settings(folder))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model here")
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        find_folder(str(tmp_path))
    with pytest.raises(ConfigError, match=r"model folder with a config\.json"):
        find_folder(str(tmp_path / "notes.txt"))


def test_a_pickle_beside_safetensors_is_not_touched(folder: Path) -> None:
    before = digest_of(folder)
    (folder / "pytorch_model.bin").write_bytes(b"would fail to load")
    assert load(settings(folder)).digest == before


def test_a_model_may_be_named_by_a_variable(
    tiny_models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLORILEGIUM_TEST_MODEL", str(tiny_models["llama"]))
    assert load(settings(Path("$FLORILEGIUM_TEST_MODEL"))).folder == tiny_models["llama"]
    monkeypatch.delenv("FLORILEGIUM_TEST_MODEL")
    with pytest.raises(ConfigError, match=r"Expected a model folder .* got '\$FLORILEGIUM_TEST_"):
        load(settings(Path("$FLORILEGIUM_TEST_MODEL")))


def test_an_unknown_hub_id_offline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    expected = r"Expected 'embedded', a folder or a reachable hub id, got 'nobody/no-such-model' \("
    with pytest.raises(ConfigError, match=expected + r"[\s\S]*check the spelling, or download"):
        load(ModelConfig(name="nobody/no-such-model"))


def test_a_head_of_other_classes_is_refused_with_both_shapes(folder: Path) -> None:
    other = LlamaForSequenceClassification.from_pretrained(folder, num_labels=5)
    other.save_pretrained(folder)
    wanted = settings(folder, task="classification")
    with pytest.raises(
        ConfigError, match=r"'score\.weight' of shape \(3, 16\).*got \(5, 16\); set"
    ):
        load(wanted, num_labels=3)
    assert load(wanted, num_labels=5).fresh_modules == ()


@pytest.mark.parametrize(("name", "head"), [("llama", "score"), ("bert", "classifier")])
def test_a_new_classification_head_is_reported_and_seeded(
    tiny_models: Mapping[str, Path], name: str, head: str
) -> None:
    wanted = settings(tiny_models[name], task="classification")
    one, again, other = (load(wanted, num_labels=3, seed=seed) for seed in (1, 1, 2))
    assert one.fresh_modules == (head,)
    key = f"{head}.weight"
    assert weights(one)[key].shape == (3, 16)
    assert torch.equal(weights(one)[key], weights(again)[key])
    assert not torch.equal(weights(one)[key], weights(other)[key])
    rest = [key for key in weights(one) if not key.startswith(head)]
    assert all(torch.equal(weights(one)[key], weights(other)[key]) for key in rest)


def test_the_digest_follows_what_decides_and_nothing_else(folder: Path) -> None:
    def changed(path: Path, content: bytes | None = None) -> bool:
        kept = path.read_bytes() if path.exists() else None
        path.write_bytes(content if content is not None else (kept or b"") + b" ")
        found = digest_of(folder)
        if kept is None:
            path.unlink()
        else:
            path.write_bytes(kept)
        return found != before

    before = digest_of(folder)
    assert re.fullmatch(r"[0-9a-f]{64}", before)
    weights = (folder / "model.safetensors").read_bytes()
    assert changed(folder / "model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    assert changed(folder / "config.json")
    assert changed(folder / "tokenizer.json")
    assert changed(folder / "tokenizer_config.json")
    assert changed(folder / "extra.safetensors")
    assert not changed(folder / "README.md")
    assert not changed(folder / "generation_config.json")
    assert not changed(folder / "pytorch_model.bin")
    assert digest_of(folder) == before
    moved = folder.rename(folder.with_name("elsewhere"))
    assert digest_of(moved) == before


def test_from_scratch_draws_seeded_weights_and_needs_none(folder: Path) -> None:
    trained = weights(load(settings(folder)))
    (folder / "model.safetensors").unlink()
    wanted = settings(folder, from_scratch=True)
    one, again, other = (load(wanted, seed=seed) for seed in (1, 1, 2))
    assert one.digest == again.digest == other.digest
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(again)[name])
    key = "model.embed_tokens.weight"
    assert not torch.equal(weights(one)[key], weights(other)[key])
    assert not torch.equal(weights(one)[key], trained[key])


def test_drawn_weights_leave_the_digest_to_the_architecture(folder: Path) -> None:
    drawn = digest_of(folder, weights=False)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    assert digest_of(folder, weights=False) == drawn
    edit_config(folder, rope_theta=1.0)
    assert digest_of(folder, weights=False) != drawn


def test_seeded_draws_depend_on_the_seed_alone_and_leave_no_trace() -> None:
    torch.manual_seed(7)
    torch.rand(3)
    before = torch.get_rng_state()
    with seeded(5):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(11)
    with seeded(5):
        second = torch.rand(4)
    with seeded(6):
        third = torch.rand(4)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_loading_leaves_the_random_state_alone(tiny_models: Mapping[str, Path]) -> None:
    before = torch.get_rng_state()
    load(settings(tiny_models["llama"], task="classification"), num_labels=3, seed=9)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cache_counts_reads_and_keeps_the_last_model(
    tiny_models: Mapping[str, Path],
) -> None:
    cache = BaseCache()
    read = [load(settings(tiny_models[name])) for name in ("llama", "gpt2")]
    assert cache.reads == 0
    assert cache.get("a", lambda: read[0]) is read[0]
    assert cache.get("a", lambda: pytest.fail("read again")) is read[0]
    assert cache.reads == 1
    assert cache.get("b", lambda: read[1]) is read[1]
    assert cache.get("a", lambda: read[0]) is read[0]
    assert cache.reads == 3


def test_a_failed_read_is_not_kept() -> None:
    cache = BaseCache()

    def fail() -> Base:
        raise ConfigError("no model")

    for _ in range(2):
        with pytest.raises(ConfigError, match="no model"):
            cache.get("a", fail)
    assert cache.reads == 0


def test_the_context_of_learnt_positions_leaves_out_the_padding(
    tiny_models: Mapping[str, Path],
) -> None:
    assert {context(load(settings(tiny_models[n])).model) for n in ("llama", "gpt2")} == {64}
    model = RobertaModel(
        RobertaConfig(
            vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=20, pad_token_id=1,
        )
    )  # fmt: skip
    limit = context(model)
    assert limit == 18
    model(input_ids=torch.full((1, limit), 3))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 3))
