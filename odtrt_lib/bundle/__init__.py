"""Chapter 5: packs a model folder into one file for the device, and uses it there.

``archive`` packs and unpacks, ``install`` builds on the device, ``detecting`` shows what the detector finds
there, and ``serving`` writes the files for Triton and DeepStream. Importing this package, and unpacking, need
the standard library only.
"""

from odtrt_lib.bundle.archive import MANIFEST as MANIFEST
from odtrt_lib.bundle.archive import MODEL as MODEL
from odtrt_lib.bundle.archive import SUFFIX as SUFFIX
from odtrt_lib.bundle.archive import Manifest as Manifest
from odtrt_lib.bundle.archive import Member as Member
from odtrt_lib.bundle.archive import Packed as Packed
from odtrt_lib.bundle.archive import pack as pack
from odtrt_lib.bundle.archive import run_archive as run_archive
from odtrt_lib.bundle.archive import unpack as unpack
from odtrt_lib.bundle.archive import verify as verify
from odtrt_lib.bundle.detecting import open_here as open_here
from odtrt_lib.bundle.detecting import run_detect as run_detect
from odtrt_lib.bundle.install import build_here as build_here
from odtrt_lib.bundle.install import missing_modules as missing_modules
from odtrt_lib.bundle.install import run_build_here as run_build_here
from odtrt_lib.bundle.serving import nvinfer_config as nvinfer_config
from odtrt_lib.bundle.serving import triton_config as triton_config
