"""Train tabular models on a cluster, score tables every night and answer online, from one artifact, on Ray.

`train`, `load`, `score` and `read_scores` are the commands' doors from Python; they are imported when first used, so
that `import claydist` costs nothing and `claydist.load` never imports Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from claydist.api import load, read_scores, score, train

__all__ = ["load", "read_scores", "score", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from claydist import api

        return getattr(api, name)
    raise AttributeError(f"module 'claydist' has no attribute {name!r}")
