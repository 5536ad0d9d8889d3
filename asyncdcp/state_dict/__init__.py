"""Nested states as flat tables of tensors and values, and back: containers, plain values, tied weights."""
