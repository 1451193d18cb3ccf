"""Knowledge Inheritance (Qin et al. 2021, arXiv 2105.13880): a small model guides a larger one's training."""

from growlib.ki.config import KIConfig
from growlib.ki.linear import linear_ki_loss
from growlib.ki.loss import KILoss, ki_loss
from growlib.ki.projection import Projection
from growlib.ki.schedules import SCHEDULES
from growlib.ki.targets import TREATMENTS, Targets, mixture
from growlib.ki.trainer import KIMixin, KITrainer

__all__ = [
    "SCHEDULES",
    "TREATMENTS",
    "KIConfig",
    "KILoss",
    "KIMixin",
    "KITrainer",
    "Projection",
    "Targets",
    "ki_loss",
    "linear_ki_loss",
    "mixture",
]
