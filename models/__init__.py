"""The base model, what is trained of it, and how: usable without Flower."""
