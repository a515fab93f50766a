"""The input: which files it has (footers), who reads what (shards, split), and the reading (reader, statistics)."""
