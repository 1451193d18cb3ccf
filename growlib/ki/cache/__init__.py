"""A teacher's targets on disk: written once, read instead of running the teacher."""
