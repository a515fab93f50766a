"""Training on Ray Train: the driver, the workers' loops, segments and resume, goals."""
