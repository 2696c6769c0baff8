"""From the files of a run directory to numbers, tables and figures.

`timeline` and `compare` need the standard library alone, so the command lines use them too.
`frames` (pandas), `figures` (plotly) and `report` are imported by name by who wants them.
"""
