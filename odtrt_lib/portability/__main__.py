"""The rebuilding process, see :func:`odtrt_lib.portability.rebuild.main`."""

import os
import sys

from odtrt_lib.portability.rebuild import main

os.nice(10)
sys.exit(main())
