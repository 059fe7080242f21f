"""Whole models around the layer: a small language model of our own, and adapters to others'."""
