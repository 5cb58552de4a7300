"""Compute kernels of fastcon: each with a plain PyTorch twin, none importing anything from fastcon."""
