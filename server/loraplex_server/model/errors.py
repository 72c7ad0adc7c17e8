"""Errors of the model package.

ModelError
├── UnsupportedModel     an architecture or an option of it that is not implemented
├── ModelNotFound        the model argument leads to no files
├── NoTokenLeft          what a request allows excludes every token; it alone fails
└── CheckpointError      files that cannot be read, or tensors that do not fit the config
"""

from __future__ import annotations

from collections.abc import Sequence


class ModelError(Exception):
    """Base of everything this package raises on purpose."""


class UnsupportedModel(ModelError):
    """The config asks for something that is not computed here; `field` names it."""

    def __init__(self, *, field: str, value: object, reason: str) -> None:
        self.field = field
        self.value = value
        self.reason = reason
        super().__init__(f"unsupported model: {field} = {value!r}: {reason}")


class ModelNotFound(ModelError):
    """No model files behind the model argument; `reason` says what to do."""

    def __init__(self, *, model: str, reason: str) -> None:
        self.model = model
        self.reason = reason
        super().__init__(f"model {model!r}: {reason}")


class NoTokenLeft(ModelError):
    """A request may choose no token any more; the message is for whoever sent it."""


class CheckpointError(ModelError):
    """The files of a model are incomplete, damaged or do not fit its config.

    `tensors` names the tensors at fault, where there are any.
    """

    def __init__(self, *, path: str, reason: str, tensors: Sequence[str] = ()) -> None:
        self.path = path
        self.reason = reason
        self.tensors = tuple(tensors)
        shown = ", ".join(self.tensors[:8]) + (", ..." if len(self.tensors) > 8 else "")
        super().__init__(f"checkpoint {path}: {reason}" + (f": {shown}" if shown else ""))
