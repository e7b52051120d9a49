"""The errors of this package, and who can mend them.

QzoError
└── UserError        the user can mend it: the command line prints one message and exits with 2
    ├── ConfigError    a setting is unknown, of the wrong type or out of range
    ├── DataError      an image, a caption or a folder of them
    ├── ModelError     a model folder, its weights or a quantized layer
    ├── OutputError    a place where a run should be written
    ├── JournalError   a journal is damaged, missing or of another run
    ├── OutOfMemory    a device has too little memory
    ├── RankLost       one of several processes died, hangs or differs
    └── TrainingDiverged  the loss stayed NaN or infinite; everything was saved before this was
    raised
"""


class QzoError(Exception):
    """Base of all errors raised on purpose by this package."""


class UserError(QzoError):
    """Three sentences for the user: what was got, what was expected, and the remedy."""

    def __init__(self, got: str, expected: str, remedy: str) -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        super().__init__(f"got: {got}\nexpected: {expected}\nremedy: {remedy}")


class ConfigError(UserError):
    pass


class DataError(UserError):
    pass


class ModelError(UserError):
    pass


class OutputError(UserError):
    pass


class JournalError(UserError):
    pass


class OutOfMemory(UserError):
    pass


class RankLost(UserError):
    pass


class TrainingDiverged(UserError):
    """Losses or gradients are NaN or infinite."""
