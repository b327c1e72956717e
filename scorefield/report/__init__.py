"""One page about a run, made from the files in its folder alone: ``scorefield report RUN`` and ``report.html``."""
