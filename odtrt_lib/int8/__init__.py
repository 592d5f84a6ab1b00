"""Chapter 6: from ``heads.onnx`` to ``heads_int8.onnx``, with Q/DQ pairs where TensorRT fuses them.

``odtrt quantise`` calls ``stage``. ``calibrate`` measures ranges, ``qdq`` places the pairs.
"""

from odtrt_lib.int8.stage import Calibration as Calibration
from odtrt_lib.int8.stage import pictures_in as pictures_in
from odtrt_lib.int8.stage import quantise as quantise
