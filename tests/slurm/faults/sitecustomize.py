"""Put on PYTHONPATH by tests: what a rank is to do otherwise, from the variable FAULTS.

A JSON object. step_seconds: how much longer each step takes. fail_at: the step that fails. nan_at:
the step whose loss is NaN.
fail_with_time: every step fails, each time with another message. diverge: every step diverges.
phase: where rank 0, once, leaves `mark` and then takes `phase_seconds`.
"""

import json
import os
import sys

if "FAULTS" in os.environ and "RANK" in os.environ and "train" in sys.orig_argv:
    from tests.slurm.faults import ranks

    ranks.apply(json.loads(os.environ["FAULTS"]))
