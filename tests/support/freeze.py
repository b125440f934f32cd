"""Imported last by the process that ranks are forked from: what it holds by then stays.

So no rank measures again how fast the processor multiplies, compiles again the thousand patterns by
which transformers renames tensors, nor looks for garbage through what all share, which would copy
it.
"""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from neftune_dist.model.flops import measured_flops

for dtype in ("fp32", "bf16"):
    measured_flops(dtype)
get_checkpoint_conversion_mapping("llama")
gc.collect()
gc.freeze()
