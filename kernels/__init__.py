"""Compute kernels of fastcon: each with a plain PyTorch twin, none importing anything from fastcon."""

STEPS = 255
"""The largest code of a quantised logit; here, so that it can be had without PyTorch."""
