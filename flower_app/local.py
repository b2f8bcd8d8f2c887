"""SuperLinks and SuperNodes as child processes, for quickstart, benchmarks and tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil

from models.section import ConfigError

QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
CONNECTION = "florilegium"

# Seconds that a SuperLink has to start: it imports a lot, from a disk that may be slow.
_START_S = 180


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of Flower's processes: their own FLWR_HOME, this interpreter's programs first."""
    programs = str(Path(sys.executable).parent)
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": path} | dict(extra or {})


@contextmanager
def process(
    command: Sequence[str], home: Path, log: Path, extra: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of this environment until the block ends, then stop it and what it started."""
    program = shutil.which(command[0], path=environment(home)["PATH"]) or command[0]
    with log.open("ab") as output:
        child = subprocess.Popen(
            [program, *command[1:]],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(home, extra),
            start_new_session=True,
        )
    try:
        yield child
    finally:
        stop(child)


def stop_on_terminate() -> None:
    """Let SIGTERM end this program as Ctrl-C does, so that what it started is stopped too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a process and all that descend from it, gently first."""
    try:
        # Flower starts its executors and Ray its workers in sessions of their own.
        family = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
    for member in family:
        _signal(member, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(family, timeout=5)
    for member in stubborn:
        _signal(member, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=5)
    child.wait()


def _signal(member: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        member.send_signal(number)


@contextmanager
def superlink(
    home: Path, *, simulation: bool, extra: Mapping[str, str] | None = None
) -> Iterator[int]:
    """A SuperLink on a free loopback port, known to `flwr` under `home` as CONNECTION.

    Yields the port. Raises RuntimeError with the end of its log when it does not come up.
    """
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = ["flower-superlink", "--insecure", "--port", str(port)]
    log = home / "superlink.log"
    with process(command + ["--simulation"] * simulation, home, log, extra) as child:
        _await_health(port, child, log)
        yield port


@contextmanager
def supernodes(
    home: Path,
    port: int,
    node_configs: Sequence[Mapping[str, str]],
    extra: Mapping[str, str] | None = None,
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One SuperNode per node config, connected to the SuperLink on `port`."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                process(
                    ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                     "--port", str(free_port()), "--node-config",
                     " ".join(f"{key}={quoted(value)}" for key, value in node.items())],
                    home / f"node-{number}",
                    home / f"node-{number}.log",
                    extra,
                )
            )
            for number, node in enumerate(node_configs)
        ]  # fmt: skip


def flwr_run(
    home: Path,
    app: Path,
    run_config: Mapping[str, bool | int | float | str],
    *,
    federation: Mapping[str, int | float | str] | None = None,
    stream: bool = True,
) -> list[str]:
    """Command line of `flwr run` against the SuperLink under `home`.

    Raises ConfigError for a text that no command line of flwr can hold.
    """
    pairs = " ".join(f"{key}={_toml(value)}" for key, value in run_config.items())
    command = ["flwr", "run", str(app), CONNECTION, *["--stream"] * stream]
    command += ["--run-config", pairs] if pairs else []
    if federation:
        options = " ".join(f"{key}={_toml(value)}" for key, value in federation.items())
        command += ["--federation-config", options]
    return command


def _toml(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) else str(value)


def quoted(text: str) -> str:
    """The text as flwr reads it back from a config on the command line; raises ConfigError.

    flwr ends a text at the next quote of the kind that it began with, escaped or not.
    """
    # TOML takes no bare DEL, which JSON does.
    basic = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
    literal = f"'{text}'"
    for written, quote in ((basic, '"'), (literal, "'")):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            if quote not in written[1:-1] and tomllib.loads(f"x = {written}")["x"] == text:
                return written
    raise ConfigError(
        "Expected a text that flwr can take on its command line, got one with both kinds of "
        f"quotes, or a line break beside a double one: {text!r}; put it into a TOML file for "
        "`flwr run --run-config`, or leave one of the two out."
    )


def _await_health(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError(
        f"Expected a SuperLink on port {port} within {_START_S} s; its log ends:\n"
        f"{log.read_text()[-2000:]}"
    )
