"""Jobs over files of any size: numbered parts in, ensembles, an output that goes on after a kill; the same on Ray Data.

Importing this package imports none of its modules: most need pyarrow.
"""
