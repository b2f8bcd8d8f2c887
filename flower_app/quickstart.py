"""The quickstart: runs `flwr run .` on a SuperLink of its own and stops that again."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from flower_app.config import Value
from flower_app.local import environment, flwr_run, stop_on_terminate, superlink
from models.paths import located
from models.section import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the app in simulation with baselines; exit status of `flwr run`, 1 without a summary."""
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__)
    parser.add_argument("--sites", type=int, default=4, help="simulated sites (default: 4)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="run-config overrides")
    options = parser.parse_args(arguments)
    stop_on_terminate()
    runs = ROOT / "runs"
    config: dict[str, Value] = {
        "run.name": "quickstart",
        "run.output-dir": str(runs),
        "run.baselines": True,
    }
    config |= dict(_override(text) for text in options.overrides)
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="florilegium-") as folder:
        home = Path(folder)
        federation = {"num-supernodes": options.sites, "client-resources-num-cpus": 1}
        try:
            command = flwr_run(home, ROOT, config, federation=federation)
        except ConfigError as error:
            raise SystemExit(str(error)) from error
        with superlink(home, simulation=True):
            status = subprocess.run(command, env=environment(home), cwd=ROOT, check=False)
    folder_of_run = _folder(config)
    summary = folder_of_run / "summary.json"
    # By its time, since a resumed run goes on in the folder that it had.
    if not summary.is_file() or summary.stat().st_mtime < started:
        print("The run did not finish; its messages above say why.", file=sys.stderr)
        return status.returncode or 1
    print(f"\nOpen {folder_of_run / 'report.html'} in a browser.")
    print(f'Try: ./scripts/generate --run {folder_of_run} --prompt "Return a list of"')
    return status.returncode


def _folder(config: Mapping[str, Value]) -> Path:
    """Where the app puts the run, or found it, given the same settings."""
    resumed = str(config.get("run.resume", ""))
    if resumed not in ("", "latest"):
        return located(resumed).resolve()
    return (located(str(config["run.output-dir"])) / "latest").resolve()


def _override(text: str) -> tuple[str, Value]:
    key, separator, value = text.partition("=")
    if not separator:
        raise SystemExit(f"Expected key=value, got {text!r}, as in run.rounds=3.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value  # a plain word needs no quotes here
    return key, parsed if isinstance(parsed, bool | int | float | str) else value


def how_to_go_on(arguments: Sequence[str]) -> str:
    """What to say when somebody stops it: the same command goes on with the same settings."""
    resumed = any(text.startswith("run.resume=") for text in arguments)
    again = [*arguments] if resumed else [*arguments, "run.resume=latest"]
    return f"Stopped. Finished rounds are kept: ./scripts/quickstart {shlex.join(again)} goes on."


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(how_to_go_on(sys.argv[1:]))
