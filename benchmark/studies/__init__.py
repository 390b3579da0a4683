"""Studies: what is measured beside the suites; each is a command, python -m benchmark.studies.NAME."""
