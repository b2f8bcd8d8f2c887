"""The ServerApp: reads the run config and runs it."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flower_app.config import parse
from flower_app.run import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Check the configuration as a whole, then train."""
    run(grid, parse(context.run_config))
