"""What was asked and measured: experiments and their tables, figures, benchmarks, plans and controls.

It imports the scripts and the package; neither imports anything of it.
"""
