"""Several donors of one stage, held on to at once: what each has, and transfers from all who have the same.

    ask some what they have
    take it, chunk by chunk, from all who hold the same; who vanishes is replaced by the others
    keep their streams until nothing more is wanted of them

Every chunk has the hash that was announced for it.

I/O: one event loop.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from averaging.errors import AveragingError, LinkError
from averaging.network import Network, PeerId
from swarm.chunks import CHUNK_BYTES, Download
from swarm.donor import SERVICE
from swarm.source import ANSWER_S, NothingError, Offer, Part, Source

DONORS = 4  # at once
AHEAD = 4  # chunks that one is asked for
AGREE_TRIES, AGREE_PAUSE_S = 5, 0.2  # for a donor that has yet to take the step that others have taken
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loading:
    """How far a transfer is."""

    what: str
    received_bytes: int
    size_bytes: int
    donors: int


class NoDonorError(AveragingError):
    """All donors of something were lost; others, or the same a moment later, may have it."""


class Donors:
    """Those that one process holds on to."""

    def __init__(
        self, network: Network, part: Part, *, on_loading: Callable[[Loading], None] = lambda loading: None
    ) -> None:
        """`part`: the stage in question, and how much there is of it."""
        self._network, self._part, self._on_loading = network, part, on_loading
        self._sources: list[Source] = []
        self._at: int | None = None  # the version that the state is wanted at, whatever they have by now
        self._begun: tuple[Offer, Download] | None = None  # a state whose donors were lost
        self._lost: dict[PeerId, str] = {}  # that have left transfers unfinished, and why: better ask others
        self._finishing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def offers(
        self, peers: Sequence[PeerId], *, at_least: int = 0, at: int | None = None, outlasting: bool = False
    ) -> list[Offer]:
        """States that a few of the `peers` have, of version `at_least` or more, or `at` that version once it
        is reached; the first peers first. Whoever was held before is released. What `outlasting` peers have
        is there again when they are.

        Raises:
            AveragingError: none has one, and at least one could not be asked: it may have one.
        """
        self.release()
        self._at = at
        found, unheard = await self._offers_of(peers, outlasting)
        usable = {peer: offer for peer, offer in found.items() if offer.name[1] >= at_least}
        offers = [offer for peer, offer in usable.items() if peer not in self._lost] or [*usable.values()]
        if not offers:
            self.release()
            if unheard is not None:
                raise unheard
        return offers

    def best(self, offers: Collection[Offer]) -> Offer:
        """What was begun, if somebody still has it; else what most hold, or the newest of several such."""
        if self._begun is not None and self._begun[0] in offers:
            return self._begun[0]
        return most_held(offers)

    async def state(self, offer: Offer) -> memoryview:
        """All of it. Raises AveragingError; the next try goes on where this one ended."""
        await asyncio.gather(*(self._reopen(source, offer.name[1]) for source in list(self._sources)))
        if self._begun is None or self._begun[0] != offer:
            self._begun = offer, Download(offer.contents)
        data = await self._download(f"version {offer.name[1]}", offer, self._begun[1])
        self._begun = None
        return data

    async def next_mean(self, step: int) -> tuple[Offer | None, bool]:
        """The mean of `step`, if a donor has it; and are all donors beyond it?"""
        asked = await asyncio.gather(*(self._ask_mean(source, step) for source in list(self._sources)))
        offers = [found for found in asked if isinstance(found, Offer)]
        outrun = not offers and any(isinstance(found, int) and found > step for found in asked)
        return (most_held(offers) if offers else None), outrun

    async def mean(self, offer: Offer) -> memoryview:
        """All of it. Raises AveragingError."""
        return await self._download(f"step {offer.name[1]}", offer, Download(offer.contents))

    def trust(self) -> None:
        """What was lost before counts no more: something has come whole."""
        self._lost.clear()

    async def say_coming(self) -> None:
        """Let them tell the trainers to look at the roster, where this peer stands."""
        for source in list(self._sources):
            try:
                await source.say_coming()
            except LinkError as error:
                self._drop(source, error)

    def release(self) -> None:
        """Need the donors no more; no-op without any."""
        for source in self._sources:
            task = asyncio.create_task(source.finish())
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        self._sources = []

    @property
    def names(self) -> str:
        return ", ".join(source.peer[-8:] for source in self._sources)

    # donors

    async def _offers_of(
        self, peers: Sequence[PeerId], outlasting: bool
    ) -> tuple[dict[PeerId, Offer], AveragingError | None]:
        """What a few of them have, the first first; and why one that may have a state could not be asked."""
        offers: dict[PeerId, Offer] = {}
        unheard: AveragingError | None = None
        remaining = list(peers)
        while remaining and len(offers) < DONORS:
            some, remaining = remaining[: DONORS - len(offers)], remaining[DONORS - len(offers) :]
            held = await asyncio.gather(*(self._hold(peer) for peer in some))
            for peer, found in zip(some, held, strict=True):
                if isinstance(found, Offer):
                    offers[peer] = found
                elif isinstance(found, NothingError):
                    log.info("no state from %s: %s", peer[-8:], found)
                else:
                    log.warning("no state from %s: %s", peer[-8:], found)
                    if outlasting or not (isinstance(found, LinkError) and found.refused):
                        unheard = found
        return offers, unheard

    async def _hold(self, peer: PeerId) -> Offer | AveragingError:
        """Hold on to a source of a state."""
        try:
            stream = await self._network.open(peer, SERVICE, max_payload_bytes=CHUNK_BYTES)
        except LinkError as error:
            return error
        source = Source(stream, self._part, self._notify)
        self._sources.append(source)
        try:
            return await source.ask(begun=self._begun[0].name[1] if self._begun else None, at=self._at)
        except (AveragingError, asyncio.CancelledError) as error:
            source.close()
            if source in self._sources:  # else it was released meanwhile
                self._sources.remove(source)
            if isinstance(error, asyncio.CancelledError):
                raise
            return error

    async def _reopen(self, source: Source, version: int) -> None:
        """Past the daemons, if that has become possible: the first stream to a peer goes through them."""
        if not source.superseded or source.error is not None:
            return
        try:
            stream = await self._network.open(source.peer, SERVICE, max_payload_bytes=CHUNK_BYTES)
        except LinkError as error:
            return log.debug("stays with its first stream: %s", error)
        better = Source(stream, self._part, self._notify)
        self._sources[self._sources.index(source)] = better
        source.close()
        try:
            await better.ask(begun=version, at=self._at)
        except AveragingError as error:
            self._drop(better, error)

    async def _ask_mean(self, source: Source, step: int) -> Offer | int | None:
        """The mean of `step`, or else where the donor is, if it answers."""
        try:
            return await source.ask(step)
        except NothingError as error:
            return error.version
        except AveragingError as error:
            self._drop(source, error)
            return None

    def _drop(self, source: Source, error: AveragingError) -> None:
        log.info("source %s: %s", source.peer[-8:], error)
        source.close()
        if source in self._sources:
            self._sources.remove(source)

    async def _download(self, what: str, offer: Offer, download: Download) -> memoryview:
        """From all donors that hold the same. Raises AveragingError when the last is lost."""
        pulls = [asyncio.create_task(self._pull(what, source, offer, download)) for source in self._sources]
        try:
            await asyncio.gather(*pulls)
        finally:
            for pull in pulls:
                pull.cancel()
        if not download.whole:
            why, here = "; ".join(self._lost.values()), f"{download.received_bytes / 1e6:.1f} MB are here"
            raise NoDonorError(f"all donors of {what} were lost, {here}: {why}")
        return download.data

    async def _pull(self, what: str, source: Source, offer: Offer, download: Download) -> None:
        """Keep one source busy until all is here, or it is lost."""
        name = offer.name
        try:
            if not await self._agrees(source, offer, download):
                return
            source.download = name, download
            while not download.whole:
                if source.error is not None:
                    raise source.error
                index = None
                if len(source.owed) < AHEAD:
                    index = download.next_of(source.peer, idle=not source.owed)
                if index is None:
                    await self._change(source)
                    pulling = sum(d.download == (name, download) for d in self._sources)
                    self._on_loading(
                        Loading(what, download.received_bytes, offer.contents.size_bytes, pulling)
                    )
                else:
                    await source.want(name, index)
        except AveragingError as error:
            self._lost[source.peer] = str(error)
            self._drop(source, error)
            self._notify()
        finally:
            download.lose(source.peer)

    async def _agrees(self, source: Source, offer: Offer, download: Download) -> bool:
        """Does it hold the same? One that is a step behind will in a moment. Raises AveragingError."""
        for _ in range(AGREE_TRIES):
            held = source.offered
            if held is not None and held.name[0] == offer.name[0] and held.name[1] >= offer.name[1]:
                return held == offer
            await asyncio.sleep(AGREE_PAUSE_S)
            if download.whole:
                return False
            with contextlib.suppress(NothingError):
                await source.ask(offer.name[1] if offer.name[0] else None)
        return False

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, source: Source) -> None:
        """Wait until something has come, or somebody is lost. Raises LinkError when a chunk is overdue."""
        left_s = source.heard_s + ANSWER_S - asyncio.get_running_loop().time() if source.owed else None
        try:
            async with asyncio.timeout(left_s):
                await self._changed.wait()
        except TimeoutError:
            raise LinkError(source.peer, f"no chunk within {ANSWER_S:.0f} s") from None


def most_held(offers: Collection[Offer]) -> Offer:
    """What most hold; of two that equally many hold the newer one."""
    held = Counter(offers)
    return max(held, key=lambda offer: (held[offer], offer.name[1]))
