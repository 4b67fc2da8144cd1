"""Errors of the swarm. `UserError` and its heirs end a command with one line and exit code 2."""

from averaging.errors import AveragingError
from averaging.errors import NoAnswerError as NoAnswerError
from averaging.errors import UserError as UserError


class SwarmError(AveragingError):
    """Base of every error that this layer raises on purpose."""


class ConfigError(UserError):
    """The run file is wrong; the message names file, line and key."""


class RunMismatchError(UserError):
    """The run found at the address is not one that this version can take part in."""


class NoPeersError(SwarmError):
    """A stage has no usable peer right now; wait for announcements and retry."""


class RejectedError(SwarmError):
    """A message from outside violates the protocol; it is dropped and counted against its sender."""

    def __init__(self, sender: str, what: str) -> None:
        super().__init__(f"from {sender[-8:]}: {what}")
        self.sender, self.what = sender, what
