"""Chapter 6: from ``heads.onnx`` to ``heads_int8.onnx``, with Q/DQ pairs where TensorRT fuses them.

``odtrt quantise`` calls ``stage``. ``calibrate`` measures ranges, ``qdq`` places the pairs.
``odtrt sensitivity`` calls ``sweep``, which measures what each convolution costs; ``sensitivity`` says what
follows from that, and ``blocks`` in which part of the network a convolution is.
"""

from odtrt_lib.int8.sensitivity import read_report as read_report
from odtrt_lib.int8.stage import Calibration as Calibration
from odtrt_lib.int8.stage import pictures_in as pictures_in
from odtrt_lib.int8.stage import quantise as quantise
from odtrt_lib.int8.sweep import measure_sensitivity as measure_sensitivity
