"""From a TensorFlow 2 Object Detection API checkpoint to a TensorRT engine, one package a stage.

Importing odtrt turns ONNX Runtime's telemetry off, which would write a device id into the home folder and
look for a server of Microsoft's. It is read once, when ONNX Runtime is imported: import odtrt before it. Who
wants it on sets ``ORT_DISABLE_TELEMETRY=0``.
"""

import os
from pathlib import Path

__version__ = "0.1.0"

# Where Python has to look to import odtrt_lib: the checkout, the unpacked bundle or site-packages.
IMPORT_PATH = str(Path(__file__).resolve().parent.parent)

if not os.environ.get("ORT_DISABLE_TELEMETRY"):
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
