"""ONNX models: read, checked, and run by ONNX Runtime on this CPU."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union

from odtrt_lib.errors import CheckError, InputError, MissingDependencyError, one_line

if TYPE_CHECKING:
    import numpy as np
    import onnx

PROFILED_RUNS = 10


def load(path: Path, content: bytes, task: str) -> onnx.ModelProto:
    """The model in ``content``, the bytes of the file at ``path``. task: what it is needed for, a verb.

    Raises InputError if it is no ONNX model, and if it keeps weights in another file, which no seal covers;
    MissingDependencyError without onnx.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(f"onnx is needed to {task} ({error}): run `make install`") from error
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX model; run `odtrt convert` again") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise InputError(f"{path}: has weights in another file, which is not sealed; save it as one file")
    return model


def require_valid(path: Path, model: Union[onnx.ModelProto, Path]) -> None:
    """Raises CheckError, which names ``path``, if the ONNX checker refuses the model or the file."""
    import onnx

    checked = str(model) if isinstance(model, Path) else model
    try:
        onnx.checker.check_model(checked, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckError(f"{path}: not a valid ONNX model: {one_line(error)}; nothing was written") from error


def session(
    model: Union[bytes, str],
    optimisation: str = "ORT_ENABLE_EXTENDED",
    profile: Optional[str] = None,
    threads: Optional[int] = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU, for the bytes or the file name of a model.

    optimisation: a name of ``GraphOptimizationLevel``. At ``ORT_ENABLE_ALL``, ONNX Runtime's blocked
    convolutions round 15 to 20 times as coarsely as TensorFlow (EfficientDet-D0). profile: the start of the
    name of a file for the times of all nodes. threads: None: one for each core. The last bits of the outputs
    depend on their number, because they divide the sums.

    Raises MissingDependencyError without ONNX Runtime, and what it raises itself for a model that it cannot
    read: its exceptions have no common base but Exception.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({one_line(error)}): run `pip install onnxruntime`"
        ) from error

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, optimisation)
    options.intra_op_num_threads = threads or 0
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def layer_times(model: bytes, inputs: Dict[str, np.ndarray]) -> List[Tuple[str, float]]:
    """Runs a model :data:`PROFILED_RUNS` times, and gives each node's name with its operator, and its median
    time in microseconds, in the order in which ONNX Runtime runs them."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(model, profile=f"{folder}/nodes")
        for _ in range(PROFILED_RUNS + 1):
            profiled.run(None, inputs)
        events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
    times: Dict[str, List[float]] = {}
    for event in events:
        node = event["name"].rpartition("_kernel_time")[0]
        if event.get("cat") == "Node" and node:
            times.setdefault(f"{node} ({event['args']['op_name']})", []).append(event["dur"])
    return [(name, statistics.median(one[1:])) for name, one in times.items() if len(one) > 1]
