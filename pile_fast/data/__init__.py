"""Data: one schema, a query per row (`RankedLists`), its readers, a generator and the collator that packs a batch.

Nothing of the core imports this package.
"""

from pile_fast.data.collator import pack_queries
from pile_fast.data.letor import read_letor
from pile_fast.data.lists import RankedLists
from pile_fast.data.locate import find_data
from pile_fast.data.mq2008 import load_mq2008
from pile_fast.data.synthetic import make_synthetic

__all__ = ["RankedLists", "find_data", "load_mq2008", "make_synthetic", "pack_queries", "read_letor"]
