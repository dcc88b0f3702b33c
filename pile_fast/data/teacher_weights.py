"""`TeacherWeights`: weights that all queries share, by the teachers' names, and the JSON file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pile_fast
from pile_fast.data.files import atomic_path
from pile_fast.loss import PILELoss
from pile_fast.options import EnsembleOptions

# Beside a saved student.
FILE_NAME = "teacher_weights.json"


@dataclasses.dataclass(frozen=True)
class TeacherWeights:
    """How much each teacher counts, as learned from labels (docs/algorithm.md, section 2a).

    Attributes:
        weights: by the teachers' names, in their order; >= 0, their sum is 1.
        labelled_queries: how many queries they were learned from; 0 = none had a pair, they are the mean's or the prior.
        options: of the ensemble, as `pile_fast.pile_ensemble` takes them.
        pile_fast: the version that learned them.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "teacher_weights.json"
    >>> TeacherWeights({"bm25": 0.25, "dense": 0.75}, labelled_queries=80).save(path)
    >>> TeacherWeights.load(path).weights
    {'bm25': 0.25, 'dense': 0.75}
    """

    weights: Mapping[str, float]
    labelled_queries: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pile_fast: str = pile_fast.__version__

    @classmethod
    def of(cls, loss: PILELoss, teachers: Sequence[str]) -> TeacherWeights:
        """What a loss has learned.

        Args:
            loss: one that `learns`, after `fit` or a first batch.
            teachers: the names of its M teachers.

        Raises:
            ValueError: there are no weights yet, or not so many.
        """
        weights = loss.weights.tolist()
        if not weights or len(weights) != len(teachers):
            raise ValueError(f"teachers: expected a name for each of the loss's {len(weights)} weights, got {len(teachers)}")
        options = {name: loss.options[name] for name in EnsembleOptions._fields if name != "pairwise"}
        return cls(dict(zip(teachers, weights, strict=True)), int(loss.labelled_queries), options)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TeacherWeights:
        """Weights from the file that `save`, `pile-fast train` or a `PileTrainer` wrote.

        Raises:
            ValueError: it is another file; the message begins with its name.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            weights = content["weights"]
            if not weights or any(type(w) not in (int, float) or not 0 <= w < math.inf for w in weights.values()):
                raise ValueError("weights: expected numbers >= 0 by the teachers' names")
            return cls(weights, int(content["labelled_queries"]), dict(content["options"]), str(content["pile_fast"]))
        except KeyError as error:
            raise ValueError(f"{path}: expected teachers' weights as {FILE_NAME} has them, found no {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected teachers' weights as {FILE_NAME} has them: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write them as JSON; the file is complete or not there."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        """One line: "bm25 0.25, dense 0.75"."""
        return ", ".join(f"{name} {weight:.3g}" for name, weight in self.weights.items())
