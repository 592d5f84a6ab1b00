"""Finds objects in pictures, a video or a camera: python detect.py FOLDER SOURCE... [--onnxruntime]

SOURCE: pictures; a video file; rtsp://...; or a camera, such as /dev/video0. All but pictures need OpenCV.
--onnxruntime: runs the network with ONNX Runtime on the CPU, not as a plan of TensorRT.
"""

import sys
from pathlib import Path

from odtrt_lib.detector import Detector
from odtrt_lib.native_detector import NativeDetector
from odtrt_lib.preprocess import load_image
from odtrt_lib.sources import is_picture, is_stream, open_camera, open_stream, open_video

folder, *places = (word for word in sys.argv[1:] if word != "--onnxruntime")
infer = Detector.open(folder, "onnxruntime").backend.infer if "--onnxruntime" in sys.argv else None


def frames(place):
    """RGB frames, uint8 [height, width, 3]."""
    if is_picture(Path(place)):
        return [load_image(place)]
    if is_stream(place):
        source = open_stream(place)
    elif place.startswith(("/dev/", "csi:")):
        source = open_camera(place)
    else:
        source = open_video(Path(place))
    return iter(source.read, None)


with NativeDetector.open(folder, infer=infer) as detector:
    for place in places:
        for frame in frames(place):
            found = detector.detect(frame)
            for name, score, box in zip(found.names, found.scores, found.boxes):
                if score > 0.5:
                    print(name, score, *box)  # box: ymin, xmin, ymax, xmax in pixels
