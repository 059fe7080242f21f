"""Results made visible: figures, tinted text, panels."""

from moe_lab.view.theme import show

__all__ = ["show"]
