"""The Ray Serve application: `serve run claydist.serving:app models=NAME`, or `import_path` of a Serve config."""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def app(args: dict[str, Any]) -> Any:
    """A Serve Application of the models that `args` names; its keys are those of `settings.ServeSpec`.

    Raises
    ------
    SpecError : with every problem in the arguments.
    """
    from claydist.serving.deployment import build

    return build(args)
