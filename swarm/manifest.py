"""The description of a run that the organizer publishes and every peer verifies: its resolved YAML.

The DHT record is signed with the organizer's key, which stands in the record's key; whoever reads it
learns the run, who organizes it, and where to send metrics. The run's id is the fingerprint of YAML and
key together: another file or another organizer is another run.

Pure.
"""

import json
from dataclasses import dataclass

from averaging.network import PROTOCOL_VERSION, PeerId
from swarm.config import RunConfig, parse_run
from swarm.errors import ConfigError, RunMismatchError
from swarm.records import fingerprint

MAX_MANIFEST_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    run: str
    organizer: PeerId
    yaml: str
    config: RunConfig


def pack_manifest(yaml_text: str) -> bytes:
    return json.dumps({"protocol": PROTOCOL_VERSION, "yaml": yaml_text}).encode()


def parse_manifest(data: object, *, organizer: PeerId) -> Manifest:
    """Validate what `organizer` published. Raises RunMismatchError."""
    if not isinstance(data, bytes) or len(data) > MAX_MANIFEST_BYTES:
        raise RunMismatchError("the run's description is not what an organizer publishes")
    try:
        fields = json.loads(data)
        protocol, text = fields["protocol"], fields["yaml"]
    except (ValueError, KeyError, TypeError):
        raise RunMismatchError("the run's description is malformed") from None
    if protocol != PROTOCOL_VERSION:
        raise RunMismatchError(
            f"the run speaks protocol version {protocol}, this program version {PROTOCOL_VERSION}: "
            "install the version that the organizer uses"
        )
    try:
        config = parse_run(text, source="the run's published file")
    except ConfigError as error:
        raise RunMismatchError(f"this version cannot take part in the run: {error}") from None
    return Manifest(make_run_id(text, organizer), organizer, text, config)


def make_run_id(yaml_text: str, organizer: PeerId) -> str:
    return fingerprint(yaml_text.encode() + organizer.encode())
