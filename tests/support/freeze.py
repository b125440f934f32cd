"""Imported last by the process that ranks are forked from: what it holds by then stays.

So no rank measures again how fast the processor multiplies, nor looks for garbage through what all
share, which would copy it.
"""

import gc

from neftune_dist.model.flops import measured_flops

for dtype in ("fp32", "bf16"):
    measured_flops(dtype)
gc.collect()
gc.freeze()
