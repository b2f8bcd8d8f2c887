"""Benchmarks that a person runs with `./scripts/bench`; they are not part of the app bundle."""
