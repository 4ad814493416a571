"""How to walk a pattern: frozen data, made once for a pattern and a set of shapes and kept in a bounded cache."""

from dilated_attention_pytorch.plans.base import DensePlan, Plan
from dilated_attention_pytorch.plans.planner import candidate_plans
from dilated_attention_pytorch.plans.strided import StridedPlan

__all__ = ["DensePlan", "Plan", "StridedPlan", "candidate_plans"]
