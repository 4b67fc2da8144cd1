"""Errors of the averaging layer: each says who, what, and what happens next."""


class AveragingError(Exception):
    """Base of every error this package raises on purpose."""


class LinkError(AveragingError):
    """A stream to `peer` could not be opened or broke; use another peer or open it again.

    `refused`: the dial was answered by a machine on which the peer does not run any more; otherwise it may
    be alive behind a broken link. `silent`: nothing came for a while, as from one that has stopped.
    """

    def __init__(self, peer: str, what: str, *, refused: bool = False, silent: bool = False) -> None:
        super().__init__(f"link to {peer[-8:]}: {what}")
        self.peer, self.what, self.refused, self.silent = peer, what, refused, silent


class UserError(AveragingError):
    """The user can fix it: the message is one line that says what, where and how."""


class PortTakenError(UserError):
    """Another process listens on the port asked for."""


class NoAnswerError(UserError):
    """Nobody answered at the address to join."""


class VersionMismatchError(LinkError):
    """The other end speaks another version of the protocol; update the older of the two."""

    def __init__(self, peer: str, *, theirs: int | None, ours: int) -> None:
        spoken = "something else" if theirs is None else f"version {theirs}"
        super().__init__(peer, f"speaks {spoken} of the protocol, this program version {ours}")


class ProtocolError(AveragingError):
    """`peer` sent bytes that violate the protocol; they are dropped and counted against it."""

    def __init__(self, peer: str, what: str) -> None:
        super().__init__(f"{peer[-8:]} broke the protocol: {what}")
        self.peer = peer
        self.what = what


class CodecError(AveragingError):
    """Bytes that claim to be an encoded tensor are malformed, of another size, or not finite."""


class BehindError(AveragingError):
    """The others have gone on without this peer, or hold another state: fetch it.

    `version`: where they are, if they say so.
    """

    def __init__(self, what: str, *, version: int | None = None) -> None:
        super().__init__(what)
        self.version = version


class MovedError(AveragingError):
    """Another peer coordinates this step: report to it."""

    def __init__(self, coordinator: str) -> None:
        super().__init__(f"moved to {coordinator[-8:]}")
        self.coordinator = coordinator


class RoundAbandonedError(AveragingError):
    """A round of averaging lost a member before everyone held the mean; close the step anew."""
