"""Before anything imports triton: its kernels run in its interpreter, on CPU tensors.

On a machine with a GPU, `TRITON_INTERPRET=0` lets the tests of models/cuda compile them instead.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
