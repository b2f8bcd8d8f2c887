"""What a site keeps across the rounds of a run, in files of its own that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flower_app.config import Config, Value
from flower_app.node import NodeConfig
from flower_app.runfolder import changes, lasting, replacing
from models.paths import located
from models.payload import Payload
from models.section import ConfigError
from strategies.messages import Scalar

# A server that was killed asks for one round again; more are kept for one restored from a copy.
_KEPT = 3
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")

Groups = dict[str, dict[str, Tensor]]  # what it is for -> name -> tensor


class StateError(OSError):
    """A site's state that could not be written or read."""


class SiteState:
    """The state of one site in one run: a file for each of the last rounds that it trained in.

    It is bound to the run's `settings`, since a server may give two runs one name: what a run
    without noise left is nothing that one with a guarantee may go on from.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Value]) -> None:
        self.folder = folder
        self._settings = settings
        self._bound = folder / "settings.json"
        self._base: int | None = None  # the round that the site goes on from, once that is known

    def after(self, round_: int) -> Groups:
        """The newest state that is not later than round `round_`; empty if the site had none yet.

        So a run that is resumed after a round finds what the site had then, even where the site
        has gone on. Raises StateError for a file that cannot be read, and where the state of that
        time is gone, and ConfigError where it is of a run with other settings.
        """
        self._base = round_
        rounds = self._rounds()
        if rounds:
            self._check_settings()
        if past := [kept for kept in rounds if kept <= round_]:
            return self._read(past[-1])
        if rounds and self._first(rounds[0]) <= round_:
            raise StateError(
                f"Expected the site's state after round {round_} in {str(self.folder)!r}, got only "
                f"rounds {rounds[0]} to {rounds[-1]}; bring the folder back from a copy, or start "
                "a new run."
            )
        return {}

    def save(self, round_: int, groups: Groups) -> None:
        """Keep the state after round `round_`, which began with that of `after`; drop all others.

        Those before it stay, up to three in all; on failure everything stays as it was.

        Raises StateError, for instance when the disk is full.
        """
        base = round_ - 1 if self._base is None else self._base
        earlier = [kept for kept in self._rounds() if kept < round_ and kept <= base]
        first = self._first(earlier[0]) if earlier else round_
        tensors = {f"{g}/{n}": t.contiguous() for g, own in groups.items() for n, t in own.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._rounds():
                with replacing(self._bound) as temporary:
                    temporary.write_text(json.dumps(dict(self._settings)), encoding="utf-8")
            with replacing(self._path(round_)) as temporary:
                save_file(tensors, temporary, {"first": str(first)})
        except (OSError, SafetensorError) as error:
            raise self._unwritten(error) from error
        for stale in set(self._rounds()) - {*earlier[1 - _KEPT :], round_}:
            self._path(stale).unlink(missing_ok=True)

    def save_adapter(self, payload: Payload) -> None:
        """Write the payload as it is loaded to `adapter/`; raises StateError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / "adapter") as temporary:
                temporary.mkdir()
                payload.save(temporary)
        except (OSError, SafetensorError) as error:
            raise self._unwritten(error) from error

    def _rounds(self) -> list[int]:
        found = self.folder.glob("round-*.safetensors")
        return sorted(int(path.stem.removeprefix("round-")) for path in found)

    def _path(self, round_: int) -> Path:
        return self.folder / f"round-{round_:05d}.safetensors"

    def _read(self, round_: int) -> Groups:
        groups: Groups = {}
        try:
            for key, tensor in sorted(load_file(self._path(round_)).items()):
                group, _, name = key.partition("/")
                groups.setdefault(group, {})[name] = tensor
        except (OSError, SafetensorError) as error:
            raise self._unreadable(self._path(round_), error) from error
        return groups

    def _check_settings(self) -> None:
        try:
            bound = json.loads(self._bound.read_bytes())
        except (OSError, ValueError) as error:
            raise self._unreadable(self._bound, error) from error
        if changed := changes(bound, self._settings):
            raise ConfigError(
                "Expected the settings with which this site has trained in a run of that name, but "
                f"{', '.join(changed)} changed; set them back, or start a new run, which gets a "
                "name of its own."
            )

    def _first(self, round_: int) -> int:
        """The first round of the run after which the site kept something."""
        try:
            with safe_open(self._path(round_), "pt") as file:
                return int(file.metadata()["first"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise self._unreadable(self._path(round_), error) from error

    def _unreadable(self, path: Path, error: Exception) -> StateError:
        return StateError(
            f"Expected a whole file of the site's state, got {str(path)!r} "
            f"({error!r}); bring it back from a copy, or remove {str(self.folder)!r} to let the "
            "site begin again from what the server sends."
        )

    def _unwritten(self, error: Exception) -> StateError:
        return StateError(
            f"Expected to write the site's state to {str(self.folder)!r}, but: {error}. The state "
            "of the rounds before is safe: free some space."
        )


def site_state(
    config: Config, node: NodeConfig, plan: Mapping[str, Scalar], site: str
) -> SiteState:
    """State of `site` in the run of `plan`, which is one with the settings of `config`."""
    return SiteState(site_folder(node, plan, site), lasting(config))


def site_folder(node: NodeConfig, plan: Mapping[str, Scalar], site: str) -> Path:
    """Folder of `site` in the run of `plan`: below state-path, in simulation in the run folder."""
    if node.simulated:
        return Path(str(plan["state"])) / file_name(site)
    return located(node.state_path) / file_name(str(plan["run"])) / file_name(site)


def require_state_path(node: NodeConfig, why: str) -> None:
    """Raise ConfigError for a deployed site that does not say where its state may lie."""
    if not node.simulated and not node.state_path:
        raise ConfigError(
            f"Expected 'state-path' in this node's config, since {why} keeps something at the "
            "site across rounds; start the SuperNode with state-path='/a/folder/that/stays'."
        )


def file_name(name: str) -> str:
    """A name that is safe for a file: itself where it is plain, else made so, with a digest."""
    if _PLAIN.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:40]}-{digest}"
