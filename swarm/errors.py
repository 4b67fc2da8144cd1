"""Errors of the swarm. `UserError` and its heirs end a command with one line and exit code 2."""

from averaging.errors import AveragingError, LinkError


class SwarmError(AveragingError):
    """Base of every error that this layer raises on purpose."""


class UserError(SwarmError):
    """The user can fix it: the message is one line that says what, where and how."""


class ConfigError(UserError):
    """The run file is wrong; the message names file, line and key."""


class PortTakenError(UserError):
    """Another process listens on the port asked for."""


class NoAnswerError(UserError):
    """Nobody answered at the address to join."""


class RunMismatchError(UserError):
    """The run found at the address is not one that this version can take part in."""


class VersionMismatchError(LinkError):
    """The other end speaks another version of the protocol; update the older of the two."""

    def __init__(self, peer: str, version: int | None) -> None:
        from swarm import PROTOCOL_VERSION

        theirs = "something else" if version is None else f"version {version}"
        super().__init__(peer, f"speaks {theirs} of the protocol, this program version {PROTOCOL_VERSION}")


class NoPeersError(SwarmError):
    """A stage has no usable peer right now; wait for announcements and retry."""


class RejectedError(SwarmError):
    """A message from outside violates the protocol; it is dropped and counted against its sender."""

    def __init__(self, sender: str, what: str) -> None:
        super().__init__(f"from {sender[-8:]}: {what}")
        self.sender, self.what = sender, what
