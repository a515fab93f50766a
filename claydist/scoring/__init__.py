"""Batch scoring: units of work by Ray tasks, staged, judged, and published a date at a time."""
