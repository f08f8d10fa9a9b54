"""QLoRA as a compiler pass: capture, rewrite to NF4 + LoRA, compile, train. See ``transform``."""

import logging
import sys

# On some CPUs bitsandbytes advises to install a kernel for its fused 4-bit product, which no graph here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in str(record.msg)
)

from .import_order import Deferred, torch_is_starting  # noqa: E402
from .tested_versions import warn_if_untested  # noqa: E402

__version__ = "0.1.0"

if torch_is_starting():
    sys.modules[__name__].__class__ = Deferred
else:
    warn_if_untested()  # before what may fail because of it
    from .public import *  # noqa: F403
    from .public import __all__ as __all__
