"""Without a GPU, Triton's kernels run in its interpreter, which it must know before they are imported."""

import os

import torch
from hypothesis import settings

pytest_plugins = ["tests.faults.tries"]

# A busy machine is no failure.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
