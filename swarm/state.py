"""How a peer gets the state of its stage: from several donors at once, and up to the step that closes now.

    ask some donors what they have, and take what most of them hold
    load it, chunk by chunk, of all who hold the same; who vanishes is replaced by the others
    replay the mean gradients of the steps that closed meanwhile, until there is none left
    keep the donors' streams until this peer takes steps itself: what closes before, it replays, too

Every chunk has the hash that was announced for it; names, shapes and types are checked before anything is
used: never a half-loaded state.

I/O: one event loop; loading in the compute thread.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Collection, Sequence

import torch

from averaging.errors import AveragingError, ProtocolError
from averaging.network import Network, PeerId
from swarm.chunks import Contents
from swarm.compute import Compute, between_hops
from swarm.donors import Donors, Loading
from swarm.holdings import contents_of, unpack_mean
from swarm.source import Offer
from swarm.stage import Stage
from swarm.tensors import tensors_in

log = logging.getLogger(__name__)


class StateLoader:
    """Brings one peer's stage to where the others are."""

    def __init__(
        self,
        network: Network,
        stage: Stage,
        compute: Compute,
        *,
        replay: Callable[[torch.Tensor, Collection[bytes]], None],
        warm_up: Callable[[], None] = lambda: None,
        on_loading: Callable[[Loading], None] = lambda loading: None,
    ) -> None:
        """`replay` takes one step with a mean gradient; `warm_up` is what can be done while the first state
        comes; both in the compute thread."""
        self._stage, self._compute, self._replay = stage, compute, replay
        self.donors = Donors(network, stage, on_loading=on_loading)
        self._warm_up: Callable[[], None] | None = warm_up
        self.outrun = False  # the donors have taken more steps than they keep the means of

    async def load(self, peers: Sequence[PeerId], *, at_least: int = 0, outlasting: bool = False) -> bool:
        """Load the newest state of `peers`, of version `at_least` or more, and replay what closed meanwhile.

        One that is the stage's own already, bit by bit, as where all begin from the seed, is not transferred.
        Returns False if none of them has one; the stage is then unchanged, as it is when this raises. The
        state of `outlasting` peers, an archive's, is not lost when they are not there.

        Raises:
            AveragingError: none gave its state, and at least one could not be asked: it may have one.
        """
        time_s = asyncio.get_running_loop().time
        asked_s = time_s()
        offers = await self.donors.offers(peers, at_least=at_least, outlasting=outlasting)
        if not offers:
            self.outrun = False
            return False
        log.debug("%d offers within %.2f s", len(offers), time_s() - asked_s)
        await self.say_coming()
        best = self.donors.best(offers)
        version, size = best.name[1], best.contents.size_bytes
        if version != self._stage.version or best.contents != await self._own_contents():
            began_s = time_s()
            data = await self._transferred(best)
            log.debug("transferred in %.2f s", time_s() - began_s)
            await between_hops(self._compute, lambda: self._load(data, version))
            took_s, names = time_s() - began_s, self.donors.names
            log.info("loaded version %d (%.1f MB) in %.1f s from %s", version, size / 1e6, took_s, names)
        else:
            log.info("the same state, of version %d, as %s", version, self.donors.names)
        self.donors.trust()
        await self.follow()
        return True

    async def follow(self) -> bool:
        """Take the steps that the donors have taken meanwhile; True if that brought the stage forward."""
        before = self._stage.version
        try:
            while True:
                step = self._stage.version
                offer, self.outrun = await self.donors.next_mean(step)
                if offer is None:
                    break
                mean, ids = unpack_mean(await self.donors.mean(offer), self._stage.values)
                await between_hops(self._compute, functools.partial(self._replay, mean, ids))
                log.info("replayed step %d", step)
        except ValueError as error:
            log.warning("cannot replay step %d: %s", self._stage.version, error)
        except AveragingError as error:
            log.info("cannot replay step %d: %s", self._stage.version, error)
        return self._stage.version > before

    async def say_coming(self) -> None:
        """This peer stands on the roster, or will in a moment: let the donors tell the trainers, who would
        find it later."""
        await self.donors.say_coming()

    def release(self) -> None:
        """Need the donors no more; no-op without any."""
        self.donors.release()

    # the stage

    async def _transferred(self, offer: Offer) -> memoryview:
        """All of it, with the device warm by then if this is the first. Raises AveragingError."""
        if self._warm_up is None:
            return await self.donors.state(offer)
        warming, self._warm_up = between_hops(self._compute, self._warm_up), None
        _, data = await asyncio.gather(warming, self.donors.state(offer))
        return data

    async def _own_contents(self) -> Contents:
        return await contents_of(await between_hops(self._compute, self._stage.snapshot))

    def _load(self, data: memoryview, version: int) -> None:
        try:
            self._stage.load(tensors_in(data), version)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ProtocolError(self.donors.names, f"the state does not fit: {error}") from None
