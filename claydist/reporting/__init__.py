"""Reports that a person reads: points of curves, plots and HTML."""
