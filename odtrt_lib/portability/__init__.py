"""Chapter 5: which plan may be used on this machine, and how another one is replaced.

``policy`` decides about a plan, and ``rebuild`` replaces it.
"""

from odtrt_lib.portability.policy import POLICY as POLICY
from odtrt_lib.portability.policy import Action as Action
from odtrt_lib.portability.policy import Environment as Environment
from odtrt_lib.portability.policy import Rule as Rule
from odtrt_lib.portability.policy import Verdict as Verdict
from odtrt_lib.portability.policy import best_plan as best_plan
from odtrt_lib.portability.policy import check as check
from odtrt_lib.portability.policy import this_environment as this_environment
from odtrt_lib.portability.rebuild import RebuildStatus as RebuildStatus
from odtrt_lib.portability.rebuild import rebuild_status as rebuild_status
from odtrt_lib.portability.rebuild import start_rebuild as start_rebuild
from odtrt_lib.portability.rebuild import wait_for_rebuild as wait_for_rebuild
