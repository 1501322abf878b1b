"""A teacher's outputs on disk: computed once, then read in random batches in every epoch and every search."""

from pydistill.store.teacher_store import TeacherStore

__all__ = ["TeacherStore"]
