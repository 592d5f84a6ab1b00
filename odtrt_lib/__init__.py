"""From a TensorFlow 2 Object Detection API checkpoint to a TensorRT engine, one room a stage."""

__version__ = "0.1.0"
