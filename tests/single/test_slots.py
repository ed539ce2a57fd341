"""Who reads what: every frame once an epoch, evenly, and the same whatever the number of ranks."""

import pickle
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_xvr.data.samples.slots import Slots, centres, permuted, slots_of_rank
from hpc_xvr.errors import InputError

plans = st.tuples(
    st.lists(st.integers(1, 400), min_size=1, max_size=40).filter(lambda n: max(n) >= 7),
    st.sampled_from([1, 3, 5, 7]),
    st.integers(1, 24),
    st.integers(0, 2**40),
)


def frames_of(pieces):
    return [(video, t) for video, start, stop in pieces for t in range(start, stop)]


def all_centres(frames, lr_frames):
    return {(v, t) for v, n in enumerate(frames) for t in centres(n, lr_frames)}


def test_centres_leave_room_for_window_and_key_frames():
    assert list(centres(7, 3)) == [1, 2, 3, 4, 5]
    assert list(centres(7, 5)) == [2, 3, 4]
    assert list(centres(7, 7)) == [3]
    assert list(centres(6, 7)) == []
    assert list(centres(4, 1)) == [1, 2]  # a key frame before and one after
    assert list(centres(1, 3)) == []


@settings(max_examples=150, deadline=None)
@given(plans)
def test_every_centre_in_exactly_one_slot(plan):
    frames, lr_frames, slots, seed = plan
    for epoch in (0, 1, 17):
        dealt = Slots(frames, lr_frames, slots, seed).deal(epoch)
        assert len(dealt) == slots
        seen = Counter(frame for pieces in dealt for frame in frames_of(pieces))
        assert set(seen) == all_centres(frames, lr_frames)
        assert max(seen.values()) == 1
        loads = [len(frames_of(pieces)) for pieces in dealt]
        assert max(loads) - min(loads) <= max(1, 0.02 * sum(loads) / slots)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_an_epoch_of_picks(plan):
    frames, lr_frames, slots, seed = plan
    plan = Slots(frames, lr_frames, slots, seed)
    dealt = plan.deal(1)
    total = len(all_centres(frames, lr_frames))
    steps = plan.steps_per_epoch
    assert steps == -(-total // slots)
    for slot, pieces in enumerate(dealt):
        own = frames_of(pieces)
        picked = [plan.pick(steps + k, slot) for k in range(steps)]
        if own:
            assert set(picked) <= set(own)
            assert len(set(picked)) == min(steps, len(own))  # none twice before all were had
        else:
            assert set(picked) <= all_centres(frames, lr_frames)


@settings(max_examples=40, deadline=None)
@given(plans)
def test_step_k_depends_on_seed_and_k_alone(plan):
    frames, lr_frames, slots, seed = plan
    plan, again = (Slots(frames, lr_frames, slots, seed) for _ in range(2))
    again = pickle.loads(pickle.dumps(again))
    steps = [0, 1, plan.steps_per_epoch - 1, plan.steps_per_epoch, 5 * plan.steps_per_epoch + 2]
    forward = {(k, g): plan.pick(k, g) for k in steps for g in range(slots)}
    for k in reversed(steps):  # a resumed run starts anywhere
        for g in reversed(range(slots)):
            assert again.pick(k, g) == forward[k, g]


def test_seeds_and_epochs_differ():
    frames = [40, 40, 30, 30, 25, 25, 60]
    plans = {seed: Slots(frames, 3, 4, seed) for seed in (1, 2)}
    steps = plans[1].steps_per_epoch

    def epoch(seed, number):
        return [plans[seed].pick(number * steps + k, g) for k in range(steps) for g in range(4)]

    orders = [epoch(1, 0), epoch(1, 1), epoch(2, 0), epoch(2, 1)]
    assert len({tuple(order) for order in orders}) == 4
    times = [t for _, t in epoch(1, 0)[::4]]
    assert times != sorted(times)


@pytest.mark.parametrize(
    "frames, slots",
    [
        ([100], 8),
        ([9], 16),
        ([1000, 3, 3, 3], 4),
        ([5] * 3, 2),
    ],
)
def test_odd_corpora_are_shared_evenly(frames, slots):
    dealt = Slots(frames, 3, slots, 1).deal(0)
    loads = [len(frames_of(pieces)) for pieces in dealt]
    assert max(loads) - min(loads) <= max(1, 0.02 * sum(loads) / slots)
    assert sum(loads) == len(all_centres(frames, 3))


def test_whole_videos_stay_together_where_that_is_even():
    dealt = Slots([50] * 40, 3, 8, 3).deal(0)
    assert all(len(pieces) == 5 for pieces in dealt)
    assert all((start, stop) == (1, 49) for pieces in dealt for _, start, stop in pieces)
    assert dealt != Slots([50] * 40, 3, 8, 3).deal(1)  # dealt anew each epoch


@pytest.mark.parametrize("batch", [8, 16, 40])
def test_ranks_share_the_slots(batch):
    whole = list(range(batch))
    for world in (1, 2, 4, 8):
        shares = [slots_of_rank(rank, world, batch) for rank in range(world)]
        assert [slot for share in shares for slot in share] == whole
        assert {len(share) for share in shares} == {batch // world}
    assert slots_of_rank(1, 4, 8) == range(2, 4)


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(InputError, match=r"train\.global_batch 10 .* 4 ranks.* multiple of 4"):
        slots_of_rank(0, 4, 10)


def test_videos_that_are_all_too_short():
    with pytest.raises(InputError, match=r"lr_frames 7 .* at least 7 frames; the longest .* 6"):
        Slots([6, 5], 7, 4, 1)


def test_a_large_plan_is_quick():
    rng = np.random.default_rng(0)
    plan = Slots(list(rng.integers(246, 266, 1358)), 3, 40, 1)
    starts = []
    for epoch in range(3):
        start = time.process_time()
        plan.pick(epoch * plan.steps_per_epoch, 0)
        starts.append(time.process_time() - start)
    assert min(starts) < 0.1
    start = time.process_time()
    for k in range(2000):
        plan.pick(2 * plan.steps_per_epoch + k, k % 40)
    assert (time.process_time() - start) / 2000 < 1e-4
    plan.pick(plan.steps_per_epoch, 0)  # the epoch before is still there
    assert len(plan._epochs) == 2


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
def test_an_order_has_every_frame_once(count, keys):
    assert sorted(permuted(i, count, keys) for i in range(count)) == list(range(count))


def test_an_order_is_shuffled_well():
    """Neighbours in the order are neighbours in the video as seldom as chance has it, and every
    place is as likely: each sum over 200 orders lies within 5 standard deviations."""
    count, orders = 500, 200
    rng = np.random.default_rng(0)
    table = np.array(
        [
            [permuted(i, count, keys) for i in range(count)]
            for keys in rng.integers(0, 2**32, (orders, 4)).tolist()
        ]
    )
    neighbours = (np.abs(np.diff(table, axis=1)) == 1).sum()
    expected = 2 * (count - 1) / count * orders
    assert abs(neighbours - expected) < 5 * expected**0.5
    spread = count / 12**0.5 / orders**0.5
    assert np.abs(table.mean(axis=0) - (count - 1) / 2).max() < 5 * spread


def test_the_memory_of_a_plan_does_not_grow_with_the_frames():
    small, large = (Slots([n] * 500, 3, 10, 1) for n in (20, 2_000_000))
    for plan in (small, large):
        plan.pick(0, 0)
    sizes = [
        sum(
            array.nbytes
            for stream in plan._epochs[0]
            for array in vars(stream).values()
            if isinstance(array, np.ndarray)
        )
        for plan in (small, large)
    ]
    assert sizes[0] == sizes[1] < 500 * 40


def test_substitutes_are_others_and_the_same_for_everyone():
    plan, again = (Slots([60] * 12, 3, 4, 5) for _ in range(2))
    tries = [plan.pick(7, 2, attempt) for attempt in range(30)]
    assert tries == [again.pick(7, 2, attempt) for attempt in range(30)]
    assert len(set(tries)) > 25 and len({video for video, _ in tries}) > 6


def test_the_videos_of_some_slots():
    plan = Slots([30] * 12, 3, 4, 5)
    steps = plan.steps_per_epoch
    for first, last in ((0, steps - 1), (steps - 2, steps + 2)):
        picked = {plan.pick(k, slot)[0] for k in range(first, last + 1) for slot in (1, 2)}
        assert picked <= set(plan.videos([1, 2], first, last))
    assert len(plan.videos([1], 0, steps - 1)) == 3  # whole videos, no others
    assert sorted(plan.videos([1], 0, 100 * steps)) == list(range(12))
