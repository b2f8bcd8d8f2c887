"""The commands for the parts of a model: cutting it, and writing with its middle at a server."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from flower_app import generate
from flower_app.split.parts import WIRE, main, max_bytes, most_tokens
from flower_app.split.stream import StreamServer
from models.section import ConfigError
from models.split.link import Limits
from models.split.load import SERVER, SITE, Cuts, digest_of_parts, load_parts
from privacy.tls import Identity
from tests.models.split.families import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def whole(tmp_path: Path, tiny_models: Mapping[str, Path]) -> Path:
    """A model of four blocks with a tokenizer."""
    folder = tmp_path / "whole"
    tiny("llama", vocab_size=512).save_pretrained(folder)
    for path in tiny_models["llama"].glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_model_is_cut(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parts"
    assert main(["cut", str(whole), "--out", str(out), "--tail-blocks", "2"]) == 0
    assert digest_of_parts(whole, Cuts(1, 2)) in capsys.readouterr().out
    assert (out / "site" / "tokenizer.json").exists()
    assert not (out / "server" / "tokenizer.json").exists()
    assert set(load_parts(out / "site", SITE, Cuts(1, 2))) == {"head", "tail"}
    assert set(load_parts(out / "server", SERVER, Cuts(1, 2))) == {"middle"}


def test_what_cannot_be_cut_exits_with_2(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cut", str(whole), "--out", str(tmp_path), "--head-blocks", "4"]) == 2
    assert "at least one block in each part of a model of 4" in capsys.readouterr().err
    assert main(["cut", str(tmp_path / "gone"), "--out", str(tmp_path)]) == 2
    assert "Expected a model folder with a config.json" in capsys.readouterr().err


@pytest.fixture
def sides(whole: Path, tmp_path: Path) -> Path:
    """A folder with the parts, an adapter, and keys of the server, a site and a stranger."""
    main(["cut", str(whole), "--out", str(tmp_path)])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(whole)
        settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, settings).save_pretrained(str(tmp_path / "adapter"))
    for who in ("server", "site", "stranger"):
        main(["keys", str(tmp_path / "keys" / who)])
    return tmp_path


@pytest.fixture
def address(sides: Path) -> Iterator[str]:
    """A server of the middle, as a process of its own."""
    command = [
        sys.executable, "-m", "flower_app.split.parts", "serve", "--model", str(sides / "server"),
        "--adapter", str(sides / "adapter"), "--keys", str(sides / "keys" / "server"),
        "--address", "127.0.0.1:0", "--certificate-of",
        f"north={sides / 'keys' / 'site' / 'certificate.pem'}",
    ]  # fmt: skip
    # What a shell starts in its background ignores Ctrl-C, and so would the server.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        signal.signal(signal.SIGINT, before)
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            found = re.search(r"middle to north at (\S+), texts of up to 64 tokens", said)
            assert found, said
            yield found[1]
        finally:
            server.send_signal(signal.SIGINT)
            try:
                assert server.wait(timeout=30) == 0
            finally:
                server.kill()


def ask(sides: Path, address: str, *more: str, who: str = "site") -> int:
    return generate.main(
        ["--split", address, "--model", str(sides / "site"), "--keys", str(sides / "keys" / who),
         "--server-certificate", str(sides / "keys" / "server" / "certificate.pem"),
         "--prompt", "the cat", "--max-new-tokens", "9", "--temperature", "0", *more]
    )  # fmt: skip


def test_text_by_two_processes_is_that_of_the_whole(
    sides: Path, whole: Path, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = str(sides / "adapter")
    assert ask(sides, address, "--adapter", adapter) == 0
    tokenizer: Any = AutoTokenizer.from_pretrained(whole)
    model: Any = AutoModelForCausalLM.from_pretrained(whole)
    model.load_adapter(adapter)
    ids = torch.tensor([[1, *tokenizer("the cat")["input_ids"]]])
    expected = tokenizer.decode(
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[
            0
        ],
        skip_special_tokens=True,
    )
    assert capfd.readouterr().out.strip("\n") == expected.strip("\n")
    assert len(expected) > len("the cat")

    assert ask(sides, address) == 2  # without the adapter it is another model
    assert "got ABORTED: The server ended the stream; its log says why" in capfd.readouterr().err
    assert ask(sides, address, "--adapter", adapter, who="stranger") == 2
    assert "UNAVAILABLE" in capfd.readouterr().err
    assert ask(sides, address, "--adapter", adapter, "--max-new-tokens", "500") == 0


@pytest.mark.parametrize("hidden", [32, 4096])
def test_a_long_context_is_cut_to_what_a_message_has_room_for(hidden: int) -> None:
    assert most_tokens(0, 64, hidden) == 64 and most_tokens(7, 64, hidden) == 7
    most = most_tokens(0, 2**30, hidden)
    assert most * hidden * 4 > 0.99 * 2**31
    own = Identity.fresh()
    with StreamServer(own, {}, lambda _, frames: frames, max_bytes=max_bytes(limits(most, hidden))):
        pass
    for more in (most + 1, 2**30):
        assert most_tokens(more, None, hidden) == more
        with pytest.raises(ConfigError, match=f"at most {most} tokens .* got {more}; lower --most"):
            max_bytes(limits(more, hidden))


def limits(tokens: int, hidden: int) -> Limits:
    return Limits(tokens, hidden, WIRE)


def test_what_is_missing_is_named(sides: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", str(sides / "keys" / "site")]) == 2
    assert "Expected no key in " in capfd.readouterr().err
    assert (sides / "keys" / "site" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert ask(sides, "127.0.0.1:1", who="nobody") == 2
    assert "Expected a key or certificate in " in capfd.readouterr().err
    assert ask(sides, "127.0.0.1:1") == 2
    assert "Expected a stream to the server at 127.0.0.1:1, got UNAVAILABLE" in (
        capfd.readouterr().err
    )
    assert generate.main(["--split", "127.0.0.1:1", "--prompt", "x"]) == 2
    assert "Expected --model with --split, got none; name it." in capfd.readouterr().err
    common = ["serve", "--model", str(sides / "server"), "--keys", str(sides / "keys" / "server")]
    assert main([*common, "--certificate-of", "north"]) == 2
    assert "Expected --certificate-of SITE=FILE, got 'north'" in capfd.readouterr().err
    assert main([*common, "--certificate-of", "north=x", "--tail-blocks", "2"]) == 2
    assert "Expected parts cut as 1/2 for causal-lm" in capfd.readouterr().err
