"""Errors that a user of claydist can meet, and the exit code each one means.

ClaydistError                 1  needed the data or the cluster to be seen
├── SpecError                 2  the spec or the arguments are wrong by themselves
├── DataError                 1  the data breaks what the spec or the model says of it
│   └── InputChanged          1  a file changed after it was inventoried
├── StorageError              1  a URL cannot be read or written
│   ├── Absent                1  nothing is there
│   └── AlreadyExists         1  exclusive creation lost to somebody else
├── BundleError               1  a bundle is damaged, or from another protocol
├── RegistryError             1  no such model, version or alias
├── ClusterError              1  the cluster can never hold what was asked for
├── TrainingError             1  training started and could not be finished
│   ├── ContractError         1  workers disagree on the shard contract
│   └── MetricError           1  the metric that decides when to stop is no number
├── GoalsMissed               3  the model is registered and not promoted
├── Locked                    4  another run holds the lock
└── GateFailed                5  a gate refused to publish
"""

from __future__ import annotations

from collections.abc import Sequence


class ClaydistError(Exception):
    """Base of all errors that are the user's to solve; `problems` lists each one found.

    Parameters
    ----------
    message : what was expected, what was found, where, and what to do.
    problems : every single problem, when there are several; empty otherwise.
    """

    exit_code = 1

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message, tuple(problems))
        self.message = message
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  - {problem}" for problem in self.problems)])

    @property
    def kind(self) -> str:
        """Name of the class, as it stands in the JSON of an error."""
        return type(self).__name__


class SpecError(ClaydistError):
    """A spec or an argument is wrong by itself; found before any data is read."""

    exit_code = 2


class DataError(ClaydistError):
    """The data breaks what the spec, or the model's schema, says of it."""


class InputChanged(DataError):
    """A file is not the one that the inventory saw."""


class StorageError(ClaydistError):
    """A URL cannot be read, written or listed."""


class Absent(StorageError):
    """Nothing was there at the moment of reading; asking anew may find it, and says nothing of that moment."""


class AlreadyExists(StorageError):
    """Exclusive creation found the name taken."""


class BundleError(ClaydistError):
    """A bundle is damaged, incomplete, or written by another protocol."""


class RegistryError(ClaydistError):
    """No such model, version or alias, or a move that is not allowed."""


class ClusterError(ClaydistError):
    """The cluster can never hold what was asked for, or cannot be reached."""


class TrainingError(ClaydistError):
    """Training started and could not be finished."""


class ContractError(TrainingError):
    """Workers disagree on names, order, dtypes, vocabulary, parameters, versions or world size."""


class MetricError(TrainingError):
    """The metric that decides when to stop is no number; the same on all workers, and again after a restart."""


class GoalsMissed(ClaydistError):
    """The model is evaluated and registered, and misses a declared goal."""

    exit_code = 3


class Locked(ClaydistError):
    """Another run holds the lock of this output and date."""

    exit_code = 4


class GateFailed(ClaydistError):
    """A gate refused to publish; staging is kept."""

    exit_code = 5
