"""Jobs over files of any size: input in numbered parts, ensembles, an output that resumes after a kill; the same on Ray Data.

Importing this package imports none of its modules: most need pyarrow.
"""
