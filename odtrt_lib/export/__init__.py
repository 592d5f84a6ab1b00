"""Chapter 1: from a checkpoint to a frozen graph without post-processing, the anchors and ``spec.json``.

``odtrt export`` calls ``stage``. ``pipeline``, ``label_map`` and ``prototext`` read the model's files,
``odapi`` runs the OD API, ``gate`` compares ``spec.json`` with it, and ``noise`` measures the effect of
rounding.
"""

from odtrt_lib.export import noise as noise
from odtrt_lib.export import odapi as odapi
from odtrt_lib.export.stage import anchors_from_config as anchors_from_config
from odtrt_lib.export.stage import export as export
from odtrt_lib.export.stage import find_model as find_model
from odtrt_lib.export.stage import run_frozen as run_frozen
