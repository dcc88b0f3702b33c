"""The loss inside other libraries' training loops: one module per library, imported by name.

Importing this package imports none of the libraries. A module whose library is missing raises an ImportError that says what to
install.
"""
