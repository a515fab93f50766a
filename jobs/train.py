r"""Train a model from a spec, as a Ray job.

    ray job submit --working-dir jobs -- python train.py flights.yaml --set data.path=s3://tables/flights \
        --registry s3://models/registry --json

Takes the arguments of `claydist train`. Inside a job paths must be absolute or storage URLs: give them in the spec,
or with --set data.path=... and --registry.
"""

from __future__ import annotations

import sys

from claydist.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
