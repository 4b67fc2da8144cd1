"""Chunked downloads: whoever is slow, lies or vanishes, what comes out is the object."""

import random

import pytest

from averaging.errors import ProtocolError
from swarm.chunks import CHUNK_BYTES, Contents, Download, chunks_of, hash_of

AHEAD = 3


def made(chunks: float, seed: int = 0) -> tuple[bytes, Contents]:
    data = random.Random(seed).randbytes(int(chunks * CHUNK_BYTES))
    return data, Contents(len(data), tuple(map(hash_of, chunks_of(data))))


def fetch(
    data: bytes, contents: Contents, speeds: dict[str, float], rng: random.Random, fate=lambda d, n: "ok"
):
    """Run a download in ticks; returns it, the ticks it took and how many chunks each donor sent."""
    download, chunks = Download(contents), list(chunks_of(data))
    owed = {donor: [] for donor in speeds}
    credit, sent = dict.fromkeys(speeds, 0.0), dict.fromkeys(speeds, 0)
    for tick in range(10_000):
        if download.whole:
            return download, tick, sent
        for donor in sorted(owed, key=lambda _: rng.random()):
            while (
                len(owed[donor]) < AHEAD
                and (index := download.next_of(donor, idle=not owed[donor])) is not None
            ):
                owed[donor].append(index)
            credit[donor] = credit[donor] + speeds[donor] if owed[donor] else 0.0
            while owed[donor] and credit[donor] >= 1:
                credit[donor] -= 1
                index = owed[donor].pop(0)
                sent[donor] += 1
                what = fate(donor, sent[donor])
                chunk = bytes(chunks[index])
                try:
                    download.take(donor, index, chunk[::-1] if what == "lie" else chunk)
                except ProtocolError:
                    what = "die"
                if what == "die":
                    download.lose(donor)
                    del owed[donor]
                    break
    raise AssertionError("never whole")


@pytest.mark.parametrize("chunks", [1e-6, 0.5, 1, 7.25])
def test_an_object_comes_out_as_it_was_hashed(chunks):
    data, contents = made(chunks)
    download, _, _ = fetch(data, contents, {"a": 1.0}, random.Random(0))
    assert bytes(download.data) == data and download.received_bytes == len(data)


def test_two_donors_take_half_the_time_of_one_and_fast_ones_bring_more():
    data, contents = made(40)
    _, alone, _ = fetch(data, contents, {"a": 1.0}, random.Random(0))
    _, together, _ = fetch(data, contents, {"a": 1.0, "b": 1.0}, random.Random(0))
    assert together <= 0.55 * alone
    _, unequal, sent = fetch(data, contents, {"a": 1.0, "b": 0.25}, random.Random(0))
    assert unequal <= 1.1 * alone / 1.25 and 2 * sent["b"] < sent["a"]


def test_a_donor_that_crawls_does_not_hold_up_the_end():
    data, contents = made(20)
    _, ticks, _ = fetch(data, contents, {"fast": 1.0, "crawls": 0.001}, random.Random(0))
    assert ticks <= 24


@pytest.mark.parametrize("seed", range(20))
def test_donors_that_die_or_lie_cost_only_what_they_owed(seed):
    rng = random.Random(seed)
    data, contents = made(12, seed)
    fates = {"b": (rng.randint(1, 5), "die"), "c": (rng.randint(1, 5), "lie")}

    def fate(donor: str, number: int) -> str:
        at, what = fates.get(donor, (0, ""))
        return what if number == at else "ok"

    speeds = {donor: rng.uniform(0.3, 2) for donor in "abc"}
    download, _, _ = fetch(data, contents, speeds, rng, fate)
    assert bytes(download.data) == data


def test_nothing_is_asked_of_more_than_two_and_late_answers_change_nothing():
    data, contents = made(1)
    download = Download(contents)
    assert [download.next_of(donor, idle=True) for donor in "abc"] == [0, 0, None]
    download.take("b", 0, data)
    assert download.whole
    download.take("a", 0, b"another")
    assert bytes(download.data) == data


@pytest.mark.parametrize(
    ("size", "packed"),
    [(0, b""), (CHUNK_BYTES + 1, bytes(32)), (10, bytes(31)), (10, bytes(64)), (11, bytes(32))],
)
def test_contents_that_make_no_sense_are_refused(size, packed):
    with pytest.raises(ProtocolError, match="stranger"):
        Contents.unpack(size, packed, donor="stranger", most_bytes=10)
