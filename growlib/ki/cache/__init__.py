"""A teacher's targets on disk: written once, read instead of running the teacher."""

from growlib.ki.cache.capture import cache_teacher
from growlib.ki.cache.reader import TeacherCache, is_cache
from growlib.ki.cache.verification import CacheVerification, verify_cache

__all__ = ["CacheVerification", "TeacherCache", "cache_teacher", "is_cache", "verify_cache"]
