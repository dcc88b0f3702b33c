"""Data: one schema, a query per row; its readers and writers, sets in memory (`RankedLists`), a generator and a collator.

Nothing of the core imports this package. pyarrow and `datasets` are imported where a file or a function needs them.
"""

from pile_fast.data.collator import pack_queries
from pile_fast.data.files import atomic_path, fingerprint
from pile_fast.data.formats import load_dataset, read_rows, write_rows
from pile_fast.data.letor import read_letor
from pile_fast.data.lists import RankedLists
from pile_fast.data.locate import find_data
from pile_fast.data.missing import missing_as_bottom
from pile_fast.data.mq2008 import load_mq2008
from pile_fast.data.rows import BadRows, DataError, check_row, ensemble_as_teacher
from pile_fast.data.synthetic import make_synthetic
from pile_fast.data.teacher_weights import TeacherWeights

__all__ = [
    "BadRows", "DataError", "RankedLists", "TeacherWeights", "atomic_path", "check_row", "ensemble_as_teacher", "find_data",
    "fingerprint", "load_dataset", "load_mq2008", "make_synthetic", "missing_as_bottom", "pack_queries", "read_letor",
    "read_rows", "write_rows",
]  # fmt: skip
