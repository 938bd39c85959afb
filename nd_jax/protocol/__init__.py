"""The evaluation protocol of the shapes world: what every system is measured on, fixed before any of them is trained.

``definition`` says which prompts and seeds, ``run`` generates and reads, ``readings`` keeps what was read on disk,
``figures`` turns readings into numbers with intervals (``statistics``), ``tables`` into a report.
"""
