"""What must hold in a simulated swarm at every moment, looked at whenever the virtual clock is about to move.

exactly once    no step takes in a gradient that the state it was stepped from contains already
versions        of a peer only grow
states          of peers that serve a stage, at one version, do not stay different
bounds          of retained bytes, held hops, queued jobs and microbatches under way
moves           none leaves a stage without a peer
progress        whenever every stage has a peer
"""

import asyncio
from collections import Counter, defaultdict

from averaging.network import PeerId
from swarm.mailbox import Hop
from swarm.peer import Peer
from tests.sim import Node, Sim, SimPeer, SimVolunteer
from trainers.throttle import STUCK

DIFFER_S = 8.0  # a peer that was away learns by then that the stage went on without it
STALL_S = 30.0  # leases, deadlines of averaging and dials one after the other
ESTRANGED_S = 15.0  # a stage hit by a fault lately may have lost whom a mover relied on
LASTING = 32  # looks from one at what lasts to the next
JOBS = 64  # beyond the hops: steps, snapshots, means
NEW = (None, 0)  # of whom nothing is known yet


class Invariants:
    """Of one swarm; raises AssertionError at the moment when one breaks."""

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.looks = 0
        # By identity: a volunteer is one peer after the other.
        self._versions: dict[int, tuple[Peer | None, int]] = {}
        self._serving: list[tuple[PeerId, int]] = []  # who serves which stage
        self._served: set[tuple[PeerId, int]] = set()
        self._hurt_s = [float("-inf")] * 3  # when the last fault hit a stage
        self._differ_s: dict[tuple[PeerId, PeerId, int], float] = {}
        self._progress: tuple[object, float] = ((), 0.0)
        self._pool = 0  # most peers that a stage has had
        self._inside: dict[Node, frozenset[bytes]] = {}
        self._away_s: dict[PeerId, float] = defaultdict(lambda: float("-inf"))

    def start(self) -> None:
        """From now on, of the running loop."""
        asyncio.get_running_loop().before_each_jump(self.look)
        stepped = self.sim.on_stepped

        def on_stepped(node: Node) -> None:
            stepped(node)
            self.once(node)

        self.sim.on_stepped = on_stepped

    def stop(self) -> None:
        asyncio.get_running_loop().before_each_jump(lambda: None)

    def hurt(self, *peers: PeerId) -> None:
        """A fault is dealt to these."""
        for peer in peers:
            self._away_s[peer] = self.sim.clock()
            if peer in self.sim.peers:
                self._hurt_s[self.sim.peers[peer].stage] = self.sim.clock()

    def look(self) -> None:
        """Cheap at every moment; what lasts is looked at now and then."""
        self.looks += 1
        assert not self.sim.errors, self.sim.errors
        peers, serving, versions = [], [], self._versions
        for p in self.sim.peers.values():
            peer = p.peer
            if hasattr(peer, "updater"):
                peers.append(p)
                version, (_, before) = peer.stage.version, versions.get(id(peer), NEW)
                if version != before:
                    # A newcomer that the stage has outrun begins anew, from what donors have.
                    grows = version > before or peer.membership.loading
                    assert grows, f"{p.id} was at version {before}, is at {version}"
                    versions[id(peer)] = peer, version
                if not peer.membership.loading:
                    serving.append((p.id, p.stage))
        if serving != self._serving:
            self._no_stage_is_left(serving)
        if self.looks % LASTING == 0:
            for p in peers:
                self._is_bounded(p)
            self._states_agree(peers)
            self._goes_on(peers)

    def once(self, node: Node) -> None:
        """Nothing in a step is in the state before it, or in it twice."""
        sim = self.sim
        times = Counter(microbatch for microbatch, _ in sim.contents[node])
        twice = [int.from_bytes(m, "big") for m, count in times.items() if count > 1]
        assert not twice, f"{node[:2]} contains {twice} twice"
        before = self._contained(sim.parent[node])
        again = sorted(int.from_bytes(m, "big") for m in before & times.keys())
        assert not again, f"{node[:2]} takes in {again} again"

    def _contained(self, node: Node) -> frozenset[bytes]:
        """All that the state contains."""
        found = self._inside.get(node)
        if found is None:
            own = frozenset(microbatch for microbatch, _ in self.sim.contents.get(node, ()))
            parent = self.sim.parent.get(node)
            found = own | (self._contained(parent) if parent is not None else frozenset())
            self._inside[node] = found
        return found

    def _is_bounded(self, p: "SimPeer | SimVolunteer") -> None:
        server, config = p.peer.server, self.sim.config
        mailbox = server.mailbox
        per_step = config.training.target_batch_tokens // config.training.microbatch_tokens
        retained = 8 * config.pipeline.queue + 4 * per_step
        asked = [hop for hop in mailbox if not (hop.is_done or _let_in_to_supply(hop))]
        assert len(asked) <= mailbox.capacity + 1, f"{p.id} has {len(asked)} hops waiting"
        assert len(mailbox) <= 2 * retained, f"{p.id} holds {len(mailbox)} hops"
        tensor = 4 * config.training.microbatch_tokens * config.model.width
        assert mailbox.retained_bytes <= 3 * tensor * retained, f"{p.id} retains {mailbox.retained_bytes} B"
        assert p.compute.queued <= 2 * config.pipeline.queue + JOBS, f"{p.id} has {p.compute.queued} jobs"
        # Never complete so far, and complete until a stage was lost with all that its peers retained.
        ledger, most = self.sim.pipeline.ledger, (1 + STUCK) * config.pipeline.in_flight
        fresh = ledger.counters["issued"] - len(self.sim.completed)
        assert fresh <= most, f"{fresh} microbatches are under way"
        self._pool = max(self._pool, *Counter(other.stage for other in self.sim.peers.values()).values())
        assert ledger.in_flight <= most + retained * self._pool, (
            f"{ledger.in_flight} microbatches are not complete"
        )

    def _no_stage_is_left(self, serving: list[tuple[PeerId, int]]) -> None:
        """Who served a stage before, and lives, does not serve another one now while nobody serves that."""
        kept, self._serving = {stage for _, stage in serving}, serving
        for peer, stage in self._served - {*serving}:
            if peer in self.sim.peers:
                hurt = self.sim.clock() - self._hurt_s[stage] < ESTRANGED_S
                assert stage in kept or hurt, f"{peer} left stage {stage} without a peer"
        self._served = {*serving}

    def _states_agree(self, peers: "list[SimPeer | SimVolunteer]") -> None:
        now_s, differ = self.sim.clock(), {}
        first: dict[tuple[int, int], tuple[PeerId, bytes]] = {}
        for p in peers:
            away = now_s - self._away_s[p.id] < DIFFER_S or p.id in self.sim.hub.hung
            state = p.peer.updater.state_hash
            if away or not state or p.peer.membership.loading:
                continue
            version = p.peer.stage.version
            other, theirs = first.setdefault((p.stage, version), (p.id, state))
            if theirs != state:
                pair = (other, p.id, version)
                since_s = differ[pair] = self._differ_s.get(pair, now_s)
                assert now_s - since_s < DIFFER_S, (
                    f"{pair[:2]} differ at version {version} since {since_s:.1f}"
                )
        self._differ_s = differ

    def _goes_on(self, peers: "list[SimPeer | SimVolunteer]") -> None:
        sim, now_s = self.sim, self.sim.clock()
        able = {p.stage for p in peers if not p.peer.membership.loading and p.id not in sim.hub.hung}
        far = (len(sim.completed), sum(sim.completed.values()), len(sim.contents))
        before, since_s = self._progress
        if before != far or len(able) < 3 or sim.hub.cut or now_s - max(self._hurt_s) < ESTRANGED_S:
            self._progress = far, now_s
            return
        assert now_s - since_s < STALL_S, f"nothing has gone on since {since_s:.1f}"


def _let_in_to_supply(hop: Hop) -> bool:
    """It came to supply a neighbour only, beyond those that wait; a newer route may ask more of it since."""
    first = hop.input_push
    return first is not None and first.stage < first.route.backward_until
