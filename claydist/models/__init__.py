"""The families of models: what each is called in a spec, and what all can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from claydist.features import Encoded, FeaturePlan
from claydist.models.boosted import XGBoostModel
from claydist.models.linear import LinearModel

__all__ = ["MODELS", "LinearModel", "Model", "XGBoostModel"]


class Model(Protocol):
    """What a predictor needs of a model."""

    kind: ClassVar[str]

    def predict_encoded(self, plan: FeaturePlan, encoded: Encoded, offset: np.ndarray | None) -> np.ndarray:
        """Values of an encoded table: (n_rows,) or (n_rows, n_outputs), as `predictor.Prediction.values`."""
        ...

    def set_threads(self, n_threads: int) -> None:
        """Predict with so many threads from now on; the answer does not depend on it."""
        ...

    def importance(self, plan: FeaturePlan) -> list[dict[str, Any]]:
        """What the model uses, the most used first, for the report."""
        ...

    def to_files(self) -> dict[str, bytes]:
        """The model as files of a bundle."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What is not in the files; `kind` among it."""
        ...


MODELS: Mapping[str, Any] = {"xgboost": XGBoostModel, "linear": LinearModel}
