"""Methods that choose which weights stay, and the moments of the data that guide them."""

from samoyeds_hf.pruning.methods import METHODS, Method, prune_experts
from samoyeds_hf.pruning.moments import Hessian, SecondMoments
from samoyeds_hf.pruning.problem import PatternLike
from samoyeds_hf.pruning.result import Pruned

__all__ = [
    "METHODS",
    "Hessian",
    "Method",
    "PatternLike",
    "Pruned",
    "SecondMoments",
    "prune_experts",
]
