"""Split learning: a model cut into head, middle and tail, each of which holds its blocks alone."""

from models.split.cut import Parts, cut, twin

__all__ = ["Parts", "cut", "twin"]
