"""How a run survives: settings and the command line, the files of a run, several processes, and what memory it takes.

A student of the method can leave this room closed. It imports the method; the method never imports it.
"""
