"""Private parts of PyTorch's distributed checkpoint. Checked against 2.11.0 and 2.13.0.

A checkpoint's metadata is a pickle of these classes; a reader that admits no others must name them.
"""

from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MemoryFormat

__all__ = ["MemoryFormat", "StorageInfo"]
