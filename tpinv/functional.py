"""Public functions with gradients, under the name PyTorch users look for: ``tpinv.functional.rms_norm`` and so on (tpinv/ops/)."""

from tpinv.ops import *  # noqa: F403
from tpinv.ops import __all__  # noqa: F401
