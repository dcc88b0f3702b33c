"""Rankers that score a file's documents: BM25 here, neural ones by `pile_fast.students.load_ranker`."""

from pile_fast.teachers.bm25 import BM25

__all__ = ["BM25"]
