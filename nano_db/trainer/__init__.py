"""What surrounds training: settings and the command line, the run and its checkpoints, several processes, memory, the
report, its plots, and frechet (how good sampled images are).

You never need it to understand a script. It imports the method; the method never imports it.
"""
