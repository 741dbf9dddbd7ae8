"""Where the kernels are tested: on a GPU if one is here, else in Triton's interpreter on the CPU.

This module must be imported before anything else imports triton, which reads TRITON_INTERPRET only then.
"""

import os
from importlib.util import find_spec

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: NO KERNEL IS TESTED")
