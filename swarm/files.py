"""Files that users hand us: text of a bounded size, or one clear line."""

from pathlib import Path

from swarm.errors import UserError


def read_text(path: Path, *, most_bytes: int, what: str) -> str:
    """The text of a file that should be `what`. Raises UserError."""
    try:
        if path.stat().st_size > most_bytes:
            raise UserError(f"{path}: larger than {most_bytes >> 20} MiB: not {what}")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
