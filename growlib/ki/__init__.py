"""Knowledge Inheritance (Qin et al. 2021, arXiv 2105.13880): a small model guides a larger one's training."""

from growlib.ki.cache.capture import cache_teacher
from growlib.ki.cache.data import read_examples
from growlib.ki.cache.reader import TeacherCache
from growlib.ki.cache.served import AnswerFile, Server, cache_served
from growlib.ki.cache.verification import CacheVerification, verify_cache
from growlib.ki.config import KIConfig
from growlib.ki.linear import linear_ki_loss
from growlib.ki.loss import KILoss, ki_loss
from growlib.ki.masking import MaskedExamples
from growlib.ki.predictions import mixture
from growlib.ki.projection import Projection
from growlib.ki.schedules import SCHEDULES, Schedule
from growlib.ki.targets import Targets
from growlib.ki.trainer import KIMixin, KITrainer
from growlib.ki.treatments import TREATMENTS

__all__ = [
    "SCHEDULES",
    "TREATMENTS",
    "AnswerFile",
    "CacheVerification",
    "KIConfig",
    "KILoss",
    "KIMixin",
    "KITrainer",
    "MaskedExamples",
    "Projection",
    "Schedule",
    "Server",
    "Targets",
    "TeacherCache",
    "cache_served",
    "cache_teacher",
    "ki_loss",
    "linear_ki_loss",
    "mixture",
    "read_examples",
    "verify_cache",
]
