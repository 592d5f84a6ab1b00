"""From a TensorFlow 2 Object Detection API checkpoint to a TensorRT engine, one package a stage.

Importing odtrt turns off ONNX Runtime's telemetry, which would write a device id into the home folder and
look for a server of Microsoft's. ONNX Runtime reads this setting once, when it is imported, so import odtrt
before it. To keep telemetry on, set ``ORT_DISABLE_TELEMETRY=0``.
"""

import os
from pathlib import Path

__version__ = "0.1.0"

# The folder from which Python imports odtrt_lib: the checkout, the unpacked bundle or site-packages.
IMPORT_PATH = str(Path(__file__).resolve().parent.parent)

if not os.environ.get("ORT_DISABLE_TELEMETRY"):
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
