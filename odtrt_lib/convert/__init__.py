"""Chapter 2: from the frozen graph to ONNX, with proof that both compute the same.

``odtrt convert`` calls ``stage``. ``rewrite`` changes the graph into one that TensorRT runs well, and
``resizes`` checks every Resize.
"""

from odtrt_lib.convert.resizes import audit_resizes as audit_resizes
from odtrt_lib.convert.stage import OPSETS as OPSETS
from odtrt_lib.convert.stage import Parity as Parity
from odtrt_lib.convert.stage import check_parity as check_parity
from odtrt_lib.convert.stage import convert as convert
from odtrt_lib.convert.stage import load_frozen as load_frozen
