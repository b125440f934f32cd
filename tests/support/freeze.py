"""Imported last by the process that ranks are forked from: what it holds by then stays.

So no rank looks through it for garbage, which would copy the memory that they share.
"""

import gc

gc.collect()
gc.freeze()
