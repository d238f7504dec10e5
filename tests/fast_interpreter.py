"""Triton's interpreter in a third of its time. At every call of a device function it searches all of triton.language for what it replaces
there; here a launch does so once, for all calls in it. Imported by interpreted_*.py.
"""

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter

EVERYWHERE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # kernels see the first, triton's own device functions the second
patch = interpreter._patch_lang
interpreter._patch_lang = lambda function: patch(EVERYWHERE)
interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
