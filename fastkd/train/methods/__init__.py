"""Distillation methods, one file each: its formula and source, its loss module, and its options with `build`.

`registry.py` lists them, `objective.py` adds them up, `base.py` has what they share. docs/methods.md explains each.
"""

from fastkd.train.methods.objective import Objective, Terms, student_features, teacher_forward
from fastkd.train.methods.registry import METHODS, LossConfig, parse_method

__all__ = ["METHODS", "LossConfig", "Objective", "Terms", "parse_method", "student_features", "teacher_forward"]
