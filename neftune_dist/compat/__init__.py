"""Private attributes of libraries, and patches of them: one module per library.

Every other module uses public names only (`tests/unit/test_architecture.py`). An entry says why
there is no public way, its module which versions it was checked against; after an upgrade, look
here first.
"""
