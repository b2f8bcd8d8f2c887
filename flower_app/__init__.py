"""The Flower app: ServerApp, ClientApp, and what composes, records and shows a run."""
