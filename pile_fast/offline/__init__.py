"""Jobs over files of any size: numbered parts in, teachers scored or ensembled, an output that resumes after a kill; Ray Data.

Importing this package imports none of its modules: most need pyarrow.
"""
