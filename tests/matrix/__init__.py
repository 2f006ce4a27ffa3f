"""The test matrix: which tests speak for which cell of the compatibility table in the docs.

    rules     from a test and its parameters to a cell
    plugin    pytest's part: marks what only `make test-all` runs, collects outcomes, forbids skips
    table     outcomes as Markdown, and the cells of a table that was written before
    __main__  the command: runs the matrix and writes docs/compatibility.md

A test that no rule knows names its cell itself: `@pytest.mark.matrix(group=…, row=…, column=…)`.
"""
