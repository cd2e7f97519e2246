"""Distillation methods, one file each: formula and source, loss module, and options with `build`.

`registry.py` lists them, `objective.py` sums them, `base.py` has shared parts. docs/methods.md explains each.
"""

from fastkd.train.methods.objective import Objective, Terms, student_features, teacher_forward
from fastkd.train.methods.registry import METHODS, LossConfig, parse_method

__all__ = ["METHODS", "LossConfig", "Objective", "Terms", "parse_method", "student_features", "teacher_forward"]
