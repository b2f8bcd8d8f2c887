"""The grid of attacks and defences behind docs/robustness.md."""
