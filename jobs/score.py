r"""Score the dates of a table that are not published yet, as a Ray job.

    ray job submit --working-dir jobs -- python score.py score-flights.yaml --date 2013-07-04 --json \
        --set input=s3://tables/flights --set output=s3://scores/flights --registry s3://models/registry

Takes the arguments of `claydist score`. Inside a job paths must be absolute or storage URLs: give them in the spec, or
with --set input=... --set output=... and --registry.
"""

from __future__ import annotations

import sys

from claydist.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
