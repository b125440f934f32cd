"""Put on PYTHONPATH by tests: how a rank is to misbehave, from the variable FAULTS.

A JSON object.

    step_seconds    how much longer each step takes
    wait_at         steps before which every rank waits until a stop is requested
    fail_at         the step that fails
    fail_rank       the rank in which it fails, instead of in all
    nan_at          the step whose loss is NaN
    diverge         every step diverges
    signal_in       phases, one for each attempt of the job: when it begins, rank 0 has its batch
                    script signalled by USR1, and waits `phase_seconds`
"""

import json
import os
import sys

if "FAULTS" in os.environ and "RANK" in os.environ and "train" in sys.orig_argv:
    from tests.slurm.faults import ranks

    ranks.apply(json.loads(os.environ["FAULTS"]))
