"""What the documentation says, held against the code."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml
from flwr.cli.run.run import _parse_federation_config_overrides
from flwr.cli.typing import SuperLinkConnection
from flwr.common.config import parse_config_args
from transformers import LlamaForCausalLM

from flower_app.bench.results import STUDIES
from flower_app.compose import check_names, check_sites, malicious
from flower_app.config import Value, known_keys, parse, sections
from flower_app.data.config import DataConfig
from flower_app.data.site import load_site
from flower_app.node import parse_node
from models.config import PayloadConfig
from models.payload import attach
from models.section import ConfigError
from models.text import Choice, Document, Instruct, Labelled
from strategies import aggregate, registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = ("flower_app", "models", "strategies", "privacy")
FILE_NAMES = {"csv", "json", "jsonl", "md", "py", "toml", "txt"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def tree() -> dict[str, str]:
    """Path to description, of every line of the README's tree."""
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in blocks(README, "text")[0].splitlines():
        name, _, meaning = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        found["".join([*folders, name])] = meaning.strip()
        if name.endswith("/"):
            folders.append(name)
    return found


def flat(nested: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    return {f"{s}.{key}": value for s, keys in nested.items() for key, value in keys.items()}


def declared() -> dict[str, Value]:
    """The run config as pyproject.toml declares it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return flat(project["tool"]["flwr"]["app"]["config"])


page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


@page
def test_relative_links_and_pictures_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if not re.match(r"[a-z]+:|#", target)]
    missing = [t for t in local if not (path.parent / t.split("#")[0]).exists()]
    assert not missing


def test_links_to_a_heading_of_the_readme_meet_one() -> None:
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    named = {a for p in PAGES for a in re.findall(r"README\.md#([\w-]+)", p.read_text("utf-8"))}
    assert named
    assert named <= headings


def test_everything_in_the_tree_exists_and_is_described() -> None:
    named = tree()
    assert not [path for path in named if not (ROOT / path).exists()]
    assert not [path for path, meaning in named.items() if not meaning]
    assert not [path for path in named if path.endswith("/") != (ROOT / path).is_dir()]


def test_every_module_and_script_is_in_the_tree() -> None:
    named = tree()
    modules = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    # An empty package file and one that only says what its folder is need no line of their own.
    telling = [path for path in modules if path.name != "__init__.py"]
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    there = {path.relative_to(ROOT).as_posix() for path in [*telling, *scripts]}
    assert not sorted(there - set(named))


@page
def test_scripts_named_exist_and_can_be_executed(path: Path) -> None:
    for name in set(re.findall(r"\./scripts/([\w-]+)", path.read_text(encoding="utf-8"))):
        script = ROOT / "scripts" / name
        assert script.is_file(), name
        assert os.access(script, os.X_OK), name


@page
def test_modules_run_by_name_exist(path: Path) -> None:
    named = re.findall(r"python -m (flower_app[\w.]*)", path.read_text(encoding="utf-8"))
    assert not [name for name in named if importlib.util.find_spec(name) is None]


@page
def test_configuration_keys_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = "|".join(sections())
    quoted = re.findall(rf"`((?:{names})\.[a-z0-9-]+)(?: = [^`]+)?`", text)
    given = re.findall(rf"(?<![\w.])((?:{names})\.[a-z0-9-]+)=", text)
    keys = {key for key in [*quoted, *given] if key.split(".")[1] not in FILE_NAMES}
    assert not sorted(keys - set(known_keys()))
    if path.name == "README.md":
        assert len(keys) > 30


def test_the_configuration_file_of_the_readme_is_accepted() -> None:
    mine = [block for block in blocks(README, "toml") if "[payload]" in block]
    assert len(mine) == 1
    config = parse(declared() | flat(tomllib.loads(mine[0])))
    assert config.payload.target_modules == "q_proj,v_proj"


def runs() -> list[Any]:
    """Every documented call of `flwr run`: its page, its words as the shell splits them."""
    found: list[Any] = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        shell = "".join(blocks(text, "bash") + blocks(text, "sh")).replace("\\\n", "")
        for line in shell.splitlines():
            if line.startswith("flwr run "):
                words = shlex.split(line.replace("\\$", "$"), comments=True)
                found.append(pytest.param(words, id=f"{path.name}-{len(found)}"))
    return found


def options(words: list[str], name: str) -> list[str]:
    return [after for word, after in pairwise(words) if word == name]


@pytest.mark.parametrize("words", runs())
def test_documented_runs_are_taken_and_have_enough_sites(words: list[str]) -> None:
    overrides = options(words, "--run-config")
    files = [text for text in overrides if text.endswith(".toml")]
    assert set(files) <= {"my-run.toml"}  # the configuration file of the README
    mine = flat(tomllib.loads(blocks(README, "toml")[0])) if files else {}
    mine |= parse_config_args([text for text in overrides if text not in files])
    config = parse(declared() | mine)
    check_names(config)
    # Steps of the adaptive ones are about as long as the rate, however short an update is.
    adaptive = config.strategy.server_optimizer in ("adam", "yogi", "adagrad")
    assert not adaptive or config.strategy.server_learning_rate <= 0.02
    federation = options(words, "--federation-config")
    connection = SuperLinkConnection(name="any", address="127.0.0.1:1")
    simulation = _parse_federation_config_overrides(federation, connection)
    count = simulation.num_supernodes if simulation else 2  # what Flower simulates unasked
    if "hospitals" in words:
        assert config.data.partition == "own"
        count = config.strategy.min_sites
    sites = [f"site-{number}" for number in range(count)]
    check_sites(config, sites)
    assert config.attack.name == "none" or malicious(config, sites)


def test_a_federation_config_that_flower_refuses_does_not_pass() -> None:
    connection = SuperLinkConnection(name="any", address="127.0.0.1:1")
    with pytest.raises(TypeError):
        _parse_federation_config_overrides(["client-resources-num-cpus=0.5"], connection)


def test_python_of_the_readme_runs(
    tmp_path: Path, tiny_models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = LlamaForCausalLM.from_pretrained(tiny_models["llama"])
    attach(trained, PayloadConfig(kind="lora"), seed=0).save(tmp_path / "runs/latest/adapter")
    snippets = blocks(README, "python")
    assert len(snippets) >= 4
    rules = []
    for snippet in snippets:
        names: dict[str, object] = {"__name__": "snippet"}
        code = snippet.replace("/srv/models/base", str(tiny_models["llama"]))
        exec(compile(code, "README.md", "exec", dont_inherit=True), names)
        rules += [names["vote"]] if "vote" in names else []
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

    # The rule works as the text below it says, by its name and with its option.
    monkeypatch.setattr(registry, "RULES", {**registry.RULES, "vote": rules[0]})
    rows = [[1.0, -2.0, 0.0], [3.0, -1.0, 5.0], [-9.0, -1.0, 0.0]]
    new = aggregate(
        "vote", {"w": torch.zeros(3)}, [{"w": torch.tensor(row)} for row in rows], vote_step=0.5
    )
    assert new["w"].tolist() == [0.5, -0.5, 0.5]
    with pytest.raises(ConfigError, match="vote_step"):
        aggregate("vote", {"w": torch.zeros(1)}, [{"w": torch.ones(1)}], vote_step=-1.0)


def test_figures_of_the_page_on_privacy_come_from_the_code_beside_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    snippets = [dedent(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(snippets) >= 4
    for snippet in snippets:
        exec(compile(snippet, "privacy.md", "exec", dont_inherit=True), {})
        stated = re.findall(r"^# (.+)$", snippet, flags=re.MULTILINE)
        assert capsys.readouterr().out.splitlines() == stated
    turns = re.findall(
        r"^\| (\d+) \| (\d+)(?:nd|th) round \| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE
    )
    assert [f"{bands} {error}" for *_, bands, error in turns] == re.findall(
        r"^# (\d+ 0\.\d+)$", text, flags=re.MULTILINE
    )


def test_rows_of_the_readme_can_be_read(tmp_path: Path) -> None:
    kinds = {
        "text": Document,
        "instruct": Instruct,
        "choice": Choice,
        "classification": Labelled,
    }
    examples = blocks(README, "jsonl")
    named = re.findall(r'^`data\.format = "(\w+)"`', README, flags=re.MULTILINE)
    assert named == list(kinds)
    assert len(examples) == len(kinds)
    for name, rows in zip(named, examples, strict=True):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(rows, encoding="utf-8")
        settings: dict[str, object] = {"format": name, "eval-fraction": 0.0, "partition": "own"}
        if name == "classification":
            settings["labels"] = "negative,positive"
        config = DataConfig.model_validate(settings)
        site = load_site(config, seed=0, site="north", num_sites=1, data_path=str(path))
        assert len(site.train) == len(rows.splitlines())
        assert all(isinstance(record, kinds[name]) for record in site.train)


@pytest.mark.parametrize(
    "command", [["flower-superlink"], ["flower-supernode"], ["flwr", "run"]], ids=" ".join
)
def test_options_of_flowers_commands_exist(command: list[str]) -> None:
    beside = Path(sys.executable).parent / command[0]
    program = str(beside) if beside.exists() else shutil.which(command[0])
    assert program, f"{command[0]} is not installed"
    helped = subprocess.run(
        [program, *command[1:], "--help"],
        capture_output=True, text=True, check=True, timeout=120,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "FLWR_TELEMETRY_ENABLED": "0",
                          "FLWR_DISABLE_UPDATE_CHECK": "1"},
    ).stdout  # fmt: skip
    calls = [
        line
        for text in blocks(README, "bash")
        for line in text.replace("\\\n", " ").splitlines()
        if line.split()[: len(command)] == command
    ]
    assert calls
    used = {option for line in calls for option in re.findall(r"(?<=\s)--[a-z-]+", line)}
    assert not [option for option in used if option not in helped]


def test_node_configs_of_the_readme_are_accepted() -> None:
    configs = re.findall(r"--node-config '([^']+)'", README)
    nodes = [parse_node(parse_config_args([text])) for text in configs]
    assert len(nodes) == 3
    assert all(node.state_path for node in nodes)  # without it no private run has a ledger
    assert len({node.site for node in nodes}) == 3


def test_places_for_measured_tables_are_closed_and_known() -> None:
    expected = {
        "results.md": set(STUDIES),
        "benchmarks.md": {"simulation", "packing", "memory", "aggregation", "dp"},
    }
    for name, wanted in expected.items():
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        opened = re.findall(r"^<!-- table:([\w-]+) -->$", text, flags=re.MULTILINE)
        closed = re.findall(r"^<!-- /table:([\w-]+) -->$", text, flags=re.MULTILINE)
        assert opened == closed
        assert set(opened) == wanted


def test_commit_hooks_use_the_projects_own_tools() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {hook["entry"].split()[0] for hook in hooks} == {".venv/bin/ruff", ".venv/bin/mypy"}


def test_the_picture_of_the_report_is_a_small_png() -> None:
    content = (ROOT / "docs" / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 250_000


def test_changelog_has_an_entry_for_what_is_not_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "keepachangelog.com" in text
    unreleased = text.split("## [Unreleased]")[1].split("\n## ")[0]
    assert re.search(r"^### (Added|Changed|Fixed|Removed)$", unreleased, flags=re.MULTILINE)
