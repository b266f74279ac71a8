"""How a run survives and reports: settings and the command line, the run and its checkpoints, several processes, what
memory it takes, the report, its plots, and frechet (how good sampled images are).

It is never needed to understand a script. It imports the method; the method never imports it.
"""
