"""A teacher's outputs on disk: computed once, read in random batches by every epoch and every sweep."""

from pydistill.store.teacher_store import TeacherStore

__all__ = ["TeacherStore"]
