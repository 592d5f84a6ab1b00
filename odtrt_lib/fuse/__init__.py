"""Chapter 4: adds the post-processing to the network, as a plugin's node or in ONNX operators."""

from odtrt_lib.fuse.onnx_form import with_onnx_nms as with_onnx_nms
from odtrt_lib.fuse.plugin import plugin_attributes as plugin_attributes
from odtrt_lib.fuse.plugin import with_plugin as with_plugin
from odtrt_lib.fuse.stage import FUSED as FUSED
from odtrt_lib.fuse.stage import fuse as fuse
