"""Chapter 3: plans, and everything that touches TensorRT.

``odtrt build`` calls ``stage``. ``fallback`` tries again with less memory, ``watch`` runs one attempt as a
process, ``builder`` is that process, and ``half`` writes half precision into the ONNX. ``passport`` describes
a plan, ``runtime`` loads it, ``pipeline`` runs it. All of them reach TensorRT's Python modules by
``bindings``.

The names of :data:`__all__` are imported when they are first asked for: the building process, whose memory is
limited and measured, imports ``builder`` alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from odtrt_lib.engine import passport as passport
    from odtrt_lib.engine import runtime as runtime
    from odtrt_lib.engine.bindings import TF32_OVERRIDE as TF32_OVERRIDE
    from odtrt_lib.engine.bindings import available_runtimes as available_runtimes
    from odtrt_lib.engine.fallback import FALLBACK as FALLBACK
    from odtrt_lib.engine.fallback import timing_cache_file as timing_cache_file
    from odtrt_lib.engine.half import half_precision as half_precision
    from odtrt_lib.engine.stage import ALLOWABLE as ALLOWABLE
    from odtrt_lib.engine.stage import DYNAMIC_BATCH as DYNAMIC_BATCH
    from odtrt_lib.engine.stage import PRECISIONS as PRECISIONS
    from odtrt_lib.engine.stage import build as build
    from odtrt_lib.engine.stage import fingerprint as fingerprint
    from odtrt_lib.engine.stage import parse_memory as parse_memory

_HOMES = {
    "passport": "",
    "runtime": "",
    "TF32_OVERRIDE": "bindings",
    "available_runtimes": "bindings",
    "ALLOWABLE": "stage",
    "FALLBACK": "fallback",
    "half_precision": "half",
    "timing_cache_file": "fallback",
    "DYNAMIC_BATCH": "stage",
    "PRECISIONS": "stage",
    "build": "stage",
    "fingerprint": "stage",
    "parse_memory": "stage",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES[name] or name}")
    return getattr(home, name) if _HOMES[name] else home
