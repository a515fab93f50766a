r"""Evaluate a registered model on a labelled table, as a Ray job.

    ray job submit --working-dir jobs -- python evaluate.py flight-delay --data s3://tables/flights17 --json \
        --registry s3://models/registry

Takes the arguments of `claydist evaluate`. Inside a job paths must be absolute or storage URLs, also --registry.
"""

from __future__ import annotations

import sys

from claydist.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
