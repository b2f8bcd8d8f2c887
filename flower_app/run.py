"""One run at the server, from the configuration to the report."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from ipaddress import ip_address
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log
from flwr.serverapp import Grid
from safetensors import SafetensorError
from torch import Tensor

from flower_app import clientlevel, compose
from flower_app.account import ServerAccount
from flower_app.baselines import run_baselines
from flower_app.card import model_card
from flower_app.config import Config
from flower_app.guarantee import guarantee
from flower_app.recorder import Recorder, summarise
from flower_app.report import results_table, write_report
from flower_app.roster import Member, Roster
from flower_app.runfolder import Checkpoint, CheckpointError, RunFolder, replacing
from flower_app.split.server import SplitServer
from flower_app.trusted import RootTrainer
from models import fold
from models.base import Base
from models.payload import Payload
from models.section import ConfigError
from models.split.site import SplitPayload
from privacy.secure.ckks_keys import tenseal
from strategies.control import parted
from strategies.flower import ComposedStrategy
from strategies.lora import check_layout
from strategies.messages import Scalar, decode_all, to_record


def run(grid: Grid, config: Config) -> RunFolder:
    """Train as `config` says, with the sites that `grid` reaches; returns the run's folder.

    Raises ConfigError before anything is loaded when the configuration cannot run.
    """
    started = time.monotonic()
    compose.check_names(config)
    _check_extras(config)
    folder, checkpoint = _open(config)
    log(INFO, "Run folder: %s", folder.path)
    base = compose.load_base(config)
    payload = compose.attach(config, base)
    initial = payload.select()
    check_layout(config.strategy.rule, payload.layout)
    facts = _facts(config, base, payload, folder, checkpoint)
    roster = Roster(base.digest, config.run.roll_call_s, facts["run"])
    done = checkpoint.round if checkpoint else 0
    members = roster.assemble(grid, config.strategy.min_sites, config.run.deadline_s, done)
    _check_members(config, payload, members)
    facts |= _simulated(members, checkpoint)
    log(INFO, "Sites: %s", ", ".join(f"{m.site} ({m.rows} rows)" for m in members.values()))
    folder.rewind(config, checkpoint)
    earlier_s = sum(row["wall_s"] for row in folder.rows() if row["kind"] == "round")
    recorder = Recorder(config, folder, facts)
    recorder.refused(roster.refused())
    if malicious := compose.malicious(config, members):
        log(WARNING, "Simulated attack %r by %s.", config.attack.name, ", ".join(sorted(malicious)))
        recorder.attacked(config.attack.name, malicious)
    server = _middle(config, base, payload, recorder, members, checkpoint)
    plan = _plan(folder, facts, _mode(members))
    strategy = _strategy(
        config, base, payload, roster, recorder, folder, plan, members, facts["run"],
        server,
    )  # fmt: skip
    if checkpoint:
        strategy.restore(checkpoint.round, checkpoint.state, checkpoint.fold)
        log(INFO, "Going on after round %d.", checkpoint.round)
    startup_s = time.monotonic() - started
    start = checkpoint.payload if checkpoint else compose.started(config, payload)
    card: dict[str, Any] = {
        "sites": list(members),
        "trainable_parameters": payload.layout.size + payload.personal_layout.size,
        "personal_parameters": payload.personal_layout.size,
        "classes": compose.num_classes(base),
        **facts,
    }
    try:
        with server or nullcontext():
            payload.load(parted(_train(grid, config, strategy, start))[0])
        fold.replace(payload, strategy.fold)
        ended = time.monotonic()
        card["privacy"] = _guarantee(config, folder, members, facts)
        _save_adapter(config, folder, payload, base.tokenizer, card)
        if config.run.baselines:
            run_baselines(grid, config, members, recorder, folder, initial)
    except BaseException:
        with suppress(OSError, ValueError):  # what ended the run matters, not its report
            log(INFO, "Report so far: %s", write_report(folder.path))
        raise
    seconds = {"startup": startup_s, "baselines": time.monotonic() - ended}
    wall_s = earlier_s + time.monotonic() - started
    _finish(config, folder, {**card, "wall_s": wall_s, "mode": _mode(members)}, seconds)
    return folder


def _open(config: Config) -> tuple[RunFolder, Checkpoint | None]:
    if config.run.resume:
        return RunFolder.resume(config)
    return RunFolder.create(config), None


def _check_extras(config: Config) -> None:
    if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "Expected the tensorboard package with run.tensorboard=true, got none; run "
            "./scripts/setup tensorboard, or set it to false."
        )
    if config.secure.aggregation == "ckks":
        tenseal()


def _facts(
    config: Config, base: Base, payload: Payload, folder: RunFolder, checkpoint: Checkpoint | None
) -> dict[str, str]:
    """What stays the same when the run is resumed; raises ConfigError where it does not."""
    facts = {"layout": compose.travelling(config, payload).digest, "base": base.digest}
    # The name that sites know the run by, whatever its folder is called.
    facts["run"] = (checkpoint.facts if checkpoint else {}).get("run", folder.path.name)
    _check_facts(checkpoint, facts)
    return facts


def _check_facts(checkpoint: Checkpoint | None, facts: Mapping[str, str]) -> None:
    # What `auto` measured is taken over, and cannot be another; how many sites there are is not
    # known yet.
    later = ("schedule", "partitions")
    known = {k: v for k, v in checkpoint.facts.items() if k not in later} if checkpoint else {}
    if checkpoint and known != facts:
        raise ConfigError(
            f"Expected the base model and layout of the run to resume ({checkpoint.facts}), got "
            f"{dict(facts)}; give the server the same model files again."
        )


def _simulated(members: Mapping[str, Member], checkpoint: Checkpoint | None) -> dict[str, str]:
    """How many sites a simulation has, as a fact; raises ConfigError where it had others."""
    count = str(max(member.partitions for member in members.values()))
    before = checkpoint.facts.get("partitions", count) if checkpoint else count
    if before != count:
        # With another number every site has other rows: those of one would be trained at another.
        raise ConfigError(
            f"Expected {before} simulated sites, as the run to resume had, got {count}; set "
            f"num-supernodes={before} in --federation-config (the quickstart: --sites {before}), "
            "or leave run.resume empty to start anew."
        )
    return {"partitions": count} if count != "0" else {}


def _mode(members: Mapping[str, Member]) -> str:
    simulated = all(member.simulated for member in members.values())
    return "simulation" if simulated else "deployment"


def _check_members(config: Config, payload: Payload, members: Mapping[str, Member]) -> None:
    _check_mode(config, members)
    compose.check_sites(config, members)
    compose.check_noise(config, compose.travelling(config, payload), members)


def _check_mode(config: Config, members: Mapping[str, Member]) -> None:
    deployed = [member.site for member in members.values() if not member.simulated]
    if deployed and config.data.partition != "own":
        raise ConfigError(
            f"Expected data.partition='own' with deployed sites ({', '.join(deployed)}), got "
            f"{config.data.partition!r}; each of them has rows of its own."
        )
    if deployed and config.payload.kind == "split":
        _check_address(config, deployed)
    if config.attack.name != "none":
        _check_attack(config, members, deployed)
    if config.run.baselines and _mode(members) == "deployment":
        raise ConfigError(
            "Expected a simulation with run.baselines=true, got deployed sites, whose rows stay "
            "with them; set it to false."
        )


def _check_address(config: Config, deployed: list[str]) -> None:
    host = config.split.listen.rpartition(":")[0].strip("[]")
    local = host in ("", "localhost")
    with suppress(ValueError):  # a name
        address = ip_address(host)
        local |= address.is_loopback or address.is_unspecified
    if local and not config.split.address:
        raise ConfigError(
            f"Expected split.address with deployed sites ({', '.join(deployed)}), got none, and no "
            f"other machine reaches split.listen={config.split.listen!r} by that name; set it to "
            "where the sites reach the server, such as 'server.example.org:9095'."
        )


def _check_attack(config: Config, members: Mapping[str, Member], deployed: list[str]) -> None:
    if deployed:
        raise ConfigError(
            f"Expected attack.name='none' with deployed sites ({', '.join(deployed)}), got "
            f"{config.attack.name!r}; attacks are for simulations only."
        )
    expected = max(member.partitions for member in members.values())
    if len(members) != expected:  # both ends draw the malicious sites from the names of all
        raise ConfigError(
            f"Expected all {expected} simulated sites to take part with attack.name="
            f"{config.attack.name!r}, got {len(members)}; mend the others, whose log says why."
        )


def _plan(folder: RunFolder, facts: Mapping[str, str], mode: str) -> dict[str, Scalar]:
    """What sites that keep something need to know; only simulated ones hear of a folder here."""
    return {"state": str(folder.sites)} if mode == "simulation" else {"run": facts["run"]}


def _middle(
    config: Config,
    base: Base,
    payload: Payload,
    recorder: Recorder,
    members: Mapping[str, Member],
    checkpoint: Checkpoint | None,
) -> SplitServer | None:
    """The server's part of a split model, as it was when the run stopped; None for a whole one."""
    known = checkpoint.facts.get("schedule", "") if checkpoint else ""
    server = compose.split_server(config, base, len(members), known)
    if server and isinstance(payload, SplitPayload):
        payload.middle = server.adapter
        recorder.beside(server.state, {"schedule": server.schedule})
        if checkpoint:
            server.restore(checkpoint.beside)
    return server


def _strategy(
    config: Config,
    base: Base,
    payload: Payload,
    roster: Roster,
    recorder: Recorder,
    folder: RunFolder,
    plan: Mapping[str, Scalar],
    sites: Collection[str],
    run: str,
    middle: SplitServer | None,
) -> ComposedStrategy:
    layout = compose.travelling(config, payload)
    adversary = compose.adversary(config, layout, sites)
    others: dict[str, Any] = {"tamper": adversary.tamper} if adversary else {}
    return ComposedStrategy(
        config.strategy,
        compose.chain(config, len(sites), ServerAccount(config, run).charge),
        layout,
        seed=config.run.seed,
        quorum=config.run.quorum,
        members=roster.present,
        # A round that did not count is none for the site either: it goes on from before it.
        plan=lambda round_, site: {
            **plan,
            **(middle.plan if middle else {}),
            "counted": recorder.counted.get(site, 0),
        },
        spool=_spool(folder),
        listener=recorder,
        trusted=RootTrainer(config, base, payload).update if config.strategy.trusts else None,
        lora_scale=payload.lora_scale,
        exchange=compose.exchange(config, layout, run, _spool(folder), middle),
        selection=clientlevel.selection(config),
        **others,
    )


def _spool(folder: RunFolder) -> Path:
    return folder.path / "spool"


def _train(
    grid: Grid, config: Config, strategy: ComposedStrategy, start: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    result = strategy.start(
        grid, to_record(start), num_rounds=config.run.rounds, timeout=config.run.deadline_s
    )
    return decode_all(result.arrays)


def _save_adapter(
    config: Config, folder: RunFolder, payload: Payload, tokenizer: Any, facts: Mapping[str, Any]
) -> None:
    with _room(folder.adapter), replacing(folder.adapter) as temporary:
        temporary.mkdir()
        payload.save(temporary)
        if config.payload.kind == "full":
            tokenizer.save_pretrained(temporary)
        card = model_card(config, {**facts, "rounds": config.run.rounds})
        (temporary / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


@contextmanager
def _room(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Expected to write {str(path)!r}, but: {error}. All rounds are safe: free some space "
            "and run again with run.resume='latest'."
        ) from error


def _guarantee(
    config: Config, folder: RunFolder, members: Mapping[str, Member], facts: Mapping[str, str]
) -> dict[str, Any]:
    released = ServerAccount(config, facts["run"]).events() if config.privacy.on else []
    rows = {member.site: member.rows for member in members.values()}
    candidates = {member.site: member.candidates for member in members.values()}
    return guarantee(config, folder.rows(), rows, released, candidates, folder.asked())


def _finish(
    config: Config, folder: RunFolder, facts: Mapping[str, Any], seconds: Mapping[str, float]
) -> None:
    keep = ("trainable_parameters", "personal_parameters", "wall_s", "mode", "privacy")
    summary = summarise(config, folder.rows(), {key: facts[key] for key in keep})
    summary["seconds"] |= seconds
    with _room(folder.path), replacing(folder.path / "summary.json") as temporary:
        text = json.dumps(summary, indent=1, ensure_ascii=False)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    with suppress(OSError):
        _spool(folder).rmdir()  # empty after every round
    report = write_report(folder.path)
    log(INFO, "\n\n%s\n", results_table(summary))
    for what, path in {"Adapter": folder.adapter, "Report": report, "Folder": folder.path}.items():
        log(INFO, "%s: %s", what, path)
