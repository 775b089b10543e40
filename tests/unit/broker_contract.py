"""What every broker must keep to. A test class for a broker subclasses `BrokerContract` and makes the broker."""

from __future__ import annotations

import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_elastic.model import Lease

LIMIT_S = 20
ACTIONS = st.one_of(
    st.tuples(st.just("poll"), st.integers(0, 100)),
    st.tuples(st.just("request"), st.integers(-1, 6)),
    st.tuples(st.just("release"), st.lists(st.integers(0, 7), max_size=4)),
)


class BrokerContract:
    """The contract. Slots are numbered from 0; `total` is how many there are at `step`."""

    def make(self, total, leases=()):
        """Return a broker that has `total` slots at any step, of which `leases` are held from the start."""
        raise NotImplementedError

    def poll(self, broker, step=0):
        return broker.poll(step, float(step), 1)

    def held(self, broker):
        return [lease.slot for lease in self.poll(broker).leases]

    def test_all_slots_are_offered_at_first(self):
        supply = self.poll(self.make(3))
        assert (supply.offered, supply.leases, supply.revoked) == (3, (), ())
        assert supply.why

    def test_leases_held_from_the_start_count(self):
        leases = (Lease(0), Lease(2))
        supply = self.poll(self.make(3, leases))
        assert (supply.offered, supply.leases) == (1, leases)

    def test_before_its_next_step_the_supply_is_the_same(self):
        broker = self.make(3)
        for step in range(20):
            supply, due = self.poll(broker, step), broker.next_step(step)
            assert due > step
            assert all(self.poll(broker, later) == supply for later in range(step, int(min(due, 30))))

    def test_a_request_is_answered_by_the_next_poll(self):
        broker = self.make(3)
        self.poll(broker)
        assert broker.request(2, 60.0) is None
        supply = self.poll(broker)
        assert [lease.slot for lease in supply.leases] == [0, 1]
        assert supply.offered == 1

    def test_no_more_is_granted_than_was_offered(self):
        broker = self.make(2)
        self.poll(broker)
        broker.request(5, 60.0)
        broker.request(5, 60.0)
        assert self.held(broker) == [0, 1]
        assert self.poll(broker).offered == 0

    def test_the_lowest_free_slots_are_granted(self):
        broker = self.make(5, (Lease(1), Lease(3)))
        self.poll(broker)
        broker.request(2, 60.0)
        assert sorted(self.held(broker)) == [0, 1, 2, 3]

    def test_slots_given_back_can_be_had_again(self):
        broker = self.make(3)
        self.poll(broker)
        broker.request(3, 60.0)
        broker.release((Lease(1),))
        assert sorted(self.held(broker)) == [0, 2]
        assert self.poll(broker).offered == 1
        broker.request(1, 60.0)
        assert sorted(self.held(broker)) == [0, 1, 2]

    def test_what_is_not_held_can_be_given_back(self):
        broker = self.make(2)
        self.poll(broker)
        broker.request(1, 60.0)
        broker.release((Lease(1), Lease(7)))
        assert self.held(broker) == [0]
        broker.release((Lease(0),))
        broker.release((Lease(0),))
        assert self.poll(broker).offered == 2

    def test_no_slot_is_leased_twice(self):
        @settings(deadline=None, max_examples=80)
        @given(st.integers(0, 6), st.lists(ACTIONS, max_size=25))
        def any_sequence(total, actions):
            self.check_sequence(total, actions)

        any_sequence()

    def check_sequence(self, total, actions):
        broker = self.make(total)
        offered, held = self.poll(broker).offered, set()
        for action, argument in actions:
            if action == "poll":
                supply = self.poll(broker, argument)
                offered = supply.offered
            elif action == "request":
                broker.request(argument, 60.0)
            else:
                broker.release(tuple(Lease(slot) for slot in argument))
                held -= set(argument)
            slots = [lease.slot for lease in self.poll(broker).leases]
            assert len(set(slots)) == len(slots), "a slot is leased twice"
            assert held <= set(slots), "a lease got lost"
            if action == "request":
                new = set(slots) - held
                assert len(new) == min(max(argument, 0), offered)
                free = sorted(set(range(total)) - held)
                assert sorted(new) == free[: len(new)]
            else:
                assert held == set(slots), "slots came or went without being asked for"
            held = set(slots)
            supply = self.poll(broker)
            offered = supply.offered
            assert offered == total - len(held)
            assert not supply.revoked

    def test_no_method_blocks(self):
        """They are called on the leader while all other ranks compute; a call that waits would hold them all up."""
        broker = self.make(1)

        def call():
            self.poll(broker)
            broker.request(100, 1e9)  # can't be granted in full, and must return all the same
            self.poll(broker)
            broker.release(())

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(LIMIT_S)
        assert not thread.is_alive()
