"""The directory on hivemind's DHT: signed, validated, expiring records; and the run's manifest.

`DHTNode` lives in our own event loop (hivemind's `DHT` forks and is not used). Every record's subkey
carries its owner's public key, so DHT peers refuse what the owner has not signed.

I/O: one event loop; every call has a deadline.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from averaging.errors import LinkError
from averaging.network import PeerId
from swarm.errors import NoAnswerError, RejectedError, RunMismatchError, UserError
from swarm.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from swarm.nodes import Nodes
from swarm.records import MAX_RECORD_BYTES, PeerRecord, parse_record, peer_id_of

RUN_KEY = "swarm/run"
MANIFEST_EXPIRE_S = 24 * 3600.0
JOIN_S = 30.0
LOOK_AGAIN_S = 1.0
SIGNATURE_BYTES = 1024  # at most, with the engine's framing
RUN_KEY_BYTES = DHTID.generate(source=RUN_KEY).to_bytes()
_OWNER = re.compile(re.escape(RSASignatureValidator.PUBLIC_KEY_FORMAT).replace(b"_key_", b"(.+?)"))
log = logging.getLogger(__name__)


def make_identity(path: Path) -> RSAPrivateKey:
    """Load the libp2p identity at `path`, or make one there. Raises UserError if it is not one."""
    if path.exists():
        try:
            data = crypto_pb2.PrivateKey.FromString(path.read_bytes()).data
            key = RSAPrivateKey.__new__(RSAPrivateKey)
            key.__setstate__({"_private_key": data})
            return key
        except Exception as error:  # whatever the parsers make of a wrong file
            raise UserError(f"--identity {path} is not an identity file: {error}") from None
    key = RSAPrivateKey()
    message = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.RSA, data=key.to_bytes())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(message.SerializeToString())
    except OSError as error:
        raise UserError(f"--identity {path} cannot be written: {error.strerror}") from None
    return key


class OwnedRecords(RSASignatureValidator):
    """Lets nothing into the DHT but bytes with their owner's signature.

    A plain value would hide a whole roster, and one that does not decode makes every read of it hang.
    """

    def validate(self, record: DHTRecord) -> bool:
        most = MAX_MANIFEST_BYTES if record.key == RUN_KEY_BYTES else MAX_RECORD_BYTES
        if record.subkey is None or _OWNER.search(record.subkey) is None:
            return False
        if len(record.value) > most + SIGNATURE_BYTES:
            return False
        try:
            value = MSGPackSerializer.loads(self.strip_value(record))
            return isinstance(value, bytes) and super().validate(record)
        except Exception as error:  # whatever the parsers make of a stranger's bytes
            log.debug("refused a record: %r", error)
            return False


class HivemindDirectory:
    """Satisfies `swarm.directory.Directory`."""

    def __init__(
        self, node: DHTNode, validator: RSASignatureValidator, expire_s: float, joined: Sequence[str]
    ) -> None:
        """`joined` are the addresses through which this process entered."""
        self._node, self._owner_tag, self._expire_s = node, validator.local_public_key, expire_s
        self.run = ""  # set once the manifest is known; part of every key
        self._nodes = Nodes(node, joined)
        self._stages = 0  # known with the manifest, too
        self._read: dict[int, tuple[float, dict[PeerId, tuple[str, ...]]]] = {}  # stage -> when, addresses
        self._looking = asyncio.Lock()
        self._looked_s = float("-inf")  # when all stages were last read for an address

    @classmethod
    async def join(
        cls, p2p: P2P, key: RSAPrivateKey, peers: Sequence[str], *, expire_s: float = 12.0
    ) -> "HivemindDirectory":
        """Enter the DHT through `peers`, or start one. Raises UserError with one clear line."""
        validator = OwnedRecords(key)
        try:
            async with asyncio.timeout(JOIN_S):
                node = await DHTNode.create(
                    p2p=p2p,
                    initial_peers=list(peers) or None,
                    record_validator=validator,
                    num_workers=4,
                    reuse_get_requests=False,  # a read must not answer with what was there before it began
                )
        except TimeoutError:
            raise NoAnswerError(f"no answer from {', '.join(peers)} within {JOIN_S:.0f} s") from None
        except Exception as error:  # the engine raises bare types; all of them mean that joining failed
            text = str(error)
            if "clock" in text.lower() or ("time" in text.lower() and "sync" in text.lower()):
                raise UserError(
                    "this machine's clock differs from the swarm's by more than 3 s: synchronise it (NTP)"
                ) from None
            raise NoAnswerError(f"cannot join through {', '.join(peers)}: {text}") from None
        return cls(node, validator, expire_s, peers)

    async def publish_manifest(self, data: bytes) -> None:
        """Announce the run for a day."""
        await self._store(RUN_KEY, data, MANIFEST_EXPIRE_S)

    async def manifest(self, organizer: PeerId | None = None) -> Manifest:
        """The run that is announced here, or by `organizer`.

        Of several it is that of the organizer whose address was joined. Raises RunMismatchError if there is
        none, or nothing to choose by, and NoAnswerError.
        """
        try:
            announced = await self._load(RUN_KEY)
        except LinkError as error:
            raise NoAnswerError(f"no run could be read from the DHT ({error}): try again") from None
        found = {owner: value for owner, value in announced if organizer is None or owner == organizer}
        if not found:
            raise RunMismatchError("no run is announced at this address: ask the organizer for the command")
        if len(found) > 1:
            found = {owner: value for owner, value in found.items() if owner in self._nodes.asked}
        if len(found) != 1:
            raise RunMismatchError("several runs are announced here: join at the address of the one you want")
        owner, value = next(iter(found.items()))
        manifest = parse_manifest(value, organizer=owner)
        self.run = manifest.run
        self._expire_s = manifest.config.network.expire_s
        self._stages = manifest.config.model.stages
        return manifest

    async def announce(self, record: PeerRecord) -> None:
        await self._store(self._key(record.stage), record.pack(), self._expire_s)

    async def withdraw(self, record: PeerRecord) -> None:
        # An empty value with a later expiration replaces the record; readers reject it.
        await self._store(self._key(record.stage), b"", self._expire_s + 1)

    async def roster(self, stage: int) -> list[PeerRecord]:
        records = []
        for owner, value in await self._load(self._key(stage)):
            if value == b"":
                continue
            try:
                records.append(parse_record(value, owner=owner))
            except RejectedError as error:
                log.warning("ignored a record %s", error)
        records = [record for record in records if record.stage == stage]
        addresses = {record.peer: record.addresses for record in records}
        self._read[stage] = asyncio.get_running_loop().time(), addresses
        self._nodes.introduce(addresses)
        return records

    async def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where a peer of any stage may be dialled, by its record; empty without one. Raises LinkError."""
        if not self._known_addresses(peer):
            time_s = asyncio.get_running_loop().time
            async with self._looking:  # one read answers all who wait, also when the peer is not found
                if not self._known_addresses(peer) and time_s() > self._looked_s + LOOK_AGAIN_S:
                    await asyncio.gather(*(self.roster(stage) for stage in range(self._stages)))
                    self._looked_s = time_s()
        return self._known_addresses(peer)

    def _known_addresses(self, peer: PeerId) -> tuple[str, ...]:
        """From rosters no older than a record lives: a peer may have come back elsewhere."""
        oldest_s = asyncio.get_running_loop().time() - self._expire_s
        recent = [addresses for at_s, addresses in self._read.values() if at_s > oldest_s]
        return next((addresses[peer] for addresses in recent if peer in addresses), ())

    def _key(self, stage: int) -> str:
        return f"swarm/{self.run}/stage/{stage}"

    async def _store(self, key: str, value: bytes, lifetime_s: float) -> None:
        def store() -> Awaitable[bool]:
            return self._node.store(key, value, get_dht_time() + lifetime_s, subkey=self._owner_tag)

        if not await self._nodes.with_others(store, f"{key} could not be stored"):
            log.warning("the DHT refused %s", key)

    async def _load(self, key: str) -> list[tuple[PeerId, Any]]:
        """(owner, value) of every signed subkey; the engine has checked the signatures. Raises LinkError."""

        def get() -> Awaitable[Any]:
            return self._node.get(key, latest=True)

        found = await self._nodes.with_others(get, f"{key} could not be read")
        entries: list[tuple[PeerId, Any]] = []
        if found is None or not hasattr(found.value, "items"):
            return entries
        for subkey, entry in found.value.items():
            match = _OWNER.search(subkey) if isinstance(subkey, bytes) else None
            if match is None:
                continue
            try:
                entries.append((peer_id_of(match.group(1)), entry.value))
            except RejectedError as error:
                log.warning("ignored a record %s", error)
        return entries

    async def close(self) -> None:
        await self._nodes.close()
        await self._node.shutdown()
