"""Private parts of lm-eval. Checked against 0.4.13."""

# A task's own settings, with the functions of its folder, before it is built: `TaskManager` only
# gives the task, which has read its data by then.
from lm_eval.tasks._yaml_loader import load_yaml

__all__ = ["load_yaml"]
