"""The pages of `docs/` and the README: their code runs, their links lead somewhere, nothing is left out.

pages     reads pages: headings, links, code, tables
scene     what the code of a page finds: a model, its data, runs
alerts    the alerts that the catalogue shows
"""
