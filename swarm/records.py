"""What peers announce in the DHT, as validated frozen records.

A record is JSON under 1 KB. The DHT key carries the owner's public key and every DHT peer checks the
owner's signature (hivemind's signature validator); here we check in addition that the peer id in the
record is the one that follows from that key, and that every field is bounded. Loads and speeds are
claims: hints for humans and for choosing a stage, never weights.

Pure.
"""

import base64
import hashlib

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from averaging.network import PeerId
from swarm.errors import RejectedError

MAX_RECORD_BYTES, MAX_ADDRESSES = 1024, 8
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class PeerRecord(BaseModel):
    """One live peer of a stage."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # later versions may say more

    peer: PeerId = Field(min_length=1, max_length=128)
    stage: int = Field(ge=0, lt=1024)
    addresses: tuple[str, ...] = Field(default=(), max_length=MAX_ADDRESSES)
    name: str = Field("", max_length=64)
    version: int = Field(0, ge=0, description="steps applied")
    speed: float = Field(0.0, ge=0, le=1e18, description="multiply-adds per second while it computes")
    queue: int = Field(0, ge=0, lt=2**31, description="jobs that wait")
    fixed: bool = Field(False, description="its user has chosen the stage: it does not move")
    heading: int | None = Field(None, ge=0, lt=1024, description="stage that it moves to")
    loading: bool = Field(False, description="its state is still coming: it serves and averages nothing yet")
    announced_s: float = Field(0.0, ge=0, description="wall clock of the announcement")
    aggregates_only: bool = Field(False, description="serves no hops and has no state")
    archives: bool = Field(False, description="has a state on disk, for when nobody else has one")

    @property
    def computes(self) -> bool:
        """Is it there for hops, now or when its state has come?"""
        return not (self.aggregates_only or self.archives)

    @property
    def serves(self) -> bool:
        """Does it take hops, and have a state?"""
        return self.computes and not self.loading

    def pack(self) -> bytes:
        """As bytes; addresses at the end are left out if there is no room for them."""
        data = self.model_dump_json(exclude_defaults=True).encode()
        if len(data) > MAX_RECORD_BYTES and self.addresses:
            return self.model_copy(update={"addresses": self.addresses[:-1]}).pack()
        return data


def parse_record(data: object, *, owner: PeerId) -> PeerRecord:
    """Validate one announced record of `owner`. Raises RejectedError."""
    if not isinstance(data, bytes) or len(data) > MAX_RECORD_BYTES:
        raise RejectedError(owner, "record is not a short byte string")
    try:
        record = PeerRecord.model_validate_json(data)
    except ValidationError as error:
        raise RejectedError(owner, f"record: {error.errors()[0]['msg']}") from None
    if record.peer != owner:
        raise RejectedError(owner, f"record speaks for another peer, {record.peer[-8:]}")
    return record


def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of an RSA public key in OpenSSH format. Raises RejectedError."""
    try:
        key = serialization.load_ssh_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        raise RejectedError("?", "malformed public key") from None
    if not isinstance(key, rsa.RSAPublicKey):
        raise RejectedError("?", "not an RSA key")
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    # libp2p: base58 of the multihash (sha2-256, 32 bytes) of a protobuf with key type RSA = 0 and the key.
    length = len(der)
    varint = bytes([length & 0x7F | 0x80, length >> 7]) if length > 0x7F else bytes([length])
    digest = hashlib.sha256(b"\x08\x00\x12" + varint + der).digest()
    return _base58(b"\x12\x20" + digest)


def _base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def fingerprint(data: bytes) -> str:
    """A short name for bytes: the first ten characters of base32 of their SHA-256."""
    return base64.b32encode(hashlib.sha256(data).digest()).decode().lower()[:10]
