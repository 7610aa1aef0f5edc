"""The two ways a run ends with one message instead of a traceback."""


class BadInput(ValueError):
    """What the user gave cannot be used: the message says what, where and what to change."""


class RunStopped(Exception):
    """A run ended before its last step, for a reason that is no bug: the message says which, and what to do."""

    def __init__(self, message: str, status: int = 1, outcome: str = "failed"):
        super().__init__(message)
        self.status = status  # of the process
        self.outcome = outcome  # in run.json
