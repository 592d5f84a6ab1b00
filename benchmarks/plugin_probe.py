"""What one TensorRT library of this machine does with the plugin; one JSON object on stdout.

python benchmarks/plugin_probe.py registry MODULE PLUGIN [SITE]
    MODULE is a Python module of TensorRT (tensorrt, tensorrt_rtx, tensorrt_lean_bindings); SITE a folder to
    import it from. Loads PLUGIN (libodtrt_tensorrt.so) into its plugin registry, finds the creator, makes a
    plugin, asks for one without an attribute, takes the library out again. Needs no GPU.

python benchmarks/plugin_probe.py build PLUGIN MODEL
    Parses MODEL (detector.onnx) with TensorRT-RTX, PLUGIN loaded, and builds a plan. Needs no GPU.

A process of its own for each, because TensorRT may end the process where it meets a plugin it does not like.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from odtrt_lib.engine import bindings

INTEGERS = {
    "background_column": 0,
    "score_converter": 0,
    "max_detections_per_class": 100,
    "max_total_detections": 100,
    "class_agnostic": 0,
    "change_coordinate_frame": 1,
}
FLOATS = {
    "logit_factor": [1.0],
    "box_scales": [10.0, 10.0, 5.0, 5.0],
    "score_threshold": [0.3],
    "iou_threshold": [0.6],
}


def probe_registry(module: str, plugin: str, site: str | None = None) -> dict[str, Any]:
    """See the module's docstring."""
    if site is not None:
        sys.path.insert(0, site)
    trt = importlib.import_module(module)
    registry = trt.get_plugin_registry()
    found: dict[str, Any] = {"runtime": module.removesuffix("_bindings"), "version": trt.__version__}
    handle = registry.load_library(plugin)
    found["loads"] = handle is not None
    creator = registry.get_creator("OdtrtDetect", "1", "odtrt")
    found["creator_found"] = creator is not None
    if creator is None:
        return found
    found["fields"] = sorted(field.name for field in creator.field_names)
    fields = _fields(trt)
    made = creator.create_plugin("detect", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    found["plugin_made"] = made is not None
    lacking = creator.create_plugin("detect", trt.PluginFieldCollection(fields[1:]), trt.TensorRTPhase.BUILD)
    found["refused_without_an_attribute"] = lacking is None
    del made, lacking, creator
    found["loads_twice"] = registry.load_library(plugin) is not None
    registry.deregister_library(handle)
    found["taken_out"] = registry.get_creator("OdtrtDetect", "1", "odtrt") is None
    return found


def probe_build(plugin: str, model: str) -> dict[str, Any]:
    """See the module's docstring."""
    bindings.let_rtx_find_itself()
    import tensorrt_rtx as trt

    messages = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    found: dict[str, Any] = {"runtime": "tensorrt_rtx", "version": trt.__version__}
    found["loads"] = builder.get_plugin_registry().load_library(plugin) is not None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    found["parses"] = parser.parse(Path(model).read_bytes())
    found["builds"] = False
    if found["parses"]:
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        plugins = [layer for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
        found["plugin_inputs"] = [
            str(layer.get_input(i).dtype).split(".")[-1] for layer in plugins for i in range(layer.num_inputs)
        ]
        found["outputs"] = {
            network.get_output(i).name: list(network.get_output(i).shape) for i in range(network.num_outputs)
        }
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            shape = tuple(network.get_input(i).shape)
            small, large = (tuple(batch if size == -1 else size for size in shape) for batch in (1, 8))
            profile.set_shape(network.get_input(i).name, small, small, large)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        found["builds"] = plan is not None
        found["plan_bytes"] = 0 if plan is None else plan.nbytes
        found["plugin_in_plan"] = plan is not None and b"OdtrtDetect" in bytes(plan)
    found["messages"] = messages
    return found


def _fields(trt: Any) -> list[Any]:
    integer, real = trt.PluginFieldType.INT32, trt.PluginFieldType.FLOAT32
    fields = [trt.PluginField(name, np.array([v], np.int32), integer) for name, v in INTEGERS.items()]
    return fields + [trt.PluginField(name, np.array(v, np.float32), real) for name, v in FLOATS.items()]


def main() -> None:
    command, *arguments = sys.argv[1:] or [""]
    if command == "registry" and len(arguments) in (2, 3):
        found = probe_registry(*arguments)
    elif command == "build" and len(arguments) == 2:
        found = probe_build(*arguments)
    else:
        raise SystemExit(__doc__)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
