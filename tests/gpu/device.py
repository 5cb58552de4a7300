"""Where the tests of this folder run: `bin/test --gpu` says so. In the ordinary suite, which hides the GPU, they are skipped.

With FASTCON_TEST_DEVICE=cpu TRITON_INTERPRET=1 they compare the CPU with itself: for whoever changes them without a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("FASTCON_TEST_DEVICE", "")
if not DEVICE:
    pytest.skip("bin/test --gpu runs these", allow_module_level=True)
if DEVICE.startswith("cuda") and not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent))  # what they share with the tests for the CPU
