"""Measurements of the scripts: speed, and the studies that launch, aggregate and plot their runs."""
