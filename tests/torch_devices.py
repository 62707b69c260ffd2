"""Where tests of torch code run: on the CPU, and on the GPU where torch sees one."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')

_SEES_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _SEES_NO_GPU])]
