"""Studies: measurements beside the suites, each a command of its own (`python -m benchmark.studies.NAME`)."""
