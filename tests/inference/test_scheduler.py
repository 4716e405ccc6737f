"""Fair scheduling: no share starves, weights count, no slot idles, and a share keeps its order."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from csm_jax.inference.scheduler import FairQueue, SlotScheduler

NAMES = st.sampled_from("abcd")
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 4.0}


def push(queue: FairQueue, name: str, number: int, weight: float = 1.0) -> None:
    queue.push((name, number), name, weight)


@settings(deadline=None)
@given(st.lists(st.one_of(NAMES, st.just("pop"), st.just("finish")), max_size=60))
def test_every_item_is_served_once_in_the_order_of_its_share(events):
    queue, pushed, served, running = FairQueue(), Counter(), [], []
    for event in events:
        if event == "pop":
            waiting = len(queue)
            item = queue.pop()
            assert (item is None) == (waiting == 0)  # work conserving
            if item:
                served.append(item)
                running.append(item[0])
        elif event == "finish":
            if running:
                queue.finish(running.pop(0))
        else:
            push(queue, event, pushed[event], WEIGHTS[event])
            pushed[event] += 1
        assert queue.num_running == len(running)
    while item := queue.pop():
        served.append(item)
    for name, count in pushed.items():
        assert [number for each, number in served if each == name] == list(range(count))


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, unique=True), st.integers(2, 20))
def test_one_server_is_shared_by_weight(names, rounds):
    """This holds while all of them have waiting items."""
    queue = FairQueue()
    total = sum(WEIGHTS[name] for name in names)
    served = Counter()
    for name in names:
        for number in range(200 * rounds):
            push(queue, name, number, WEIGHTS[name])
    for _ in range(int(rounds * total)):
        name, _ = queue.pop()
        queue.finish(name)
        served[name] += 1
    for name in names:
        assert abs(served[name] - rounds * WEIGHTS[name]) <= 2 + 0.1 * rounds * WEIGHTS[name]


@settings(deadline=None)
@given(st.integers(1, 9))
def test_slots_are_shared_by_weight(num_slots):
    """While nothing finishes, no share has a slot more per weight than another lacks."""
    queue = FairQueue()
    for number in range(9):
        push(queue, "a", number, 1.0)
        push(queue, "b", number, 2.0)
    rows = Counter(queue.pop()[0] for _ in range(num_slots))
    assert rows["b"] - 2 <= 2 * rows["a"] <= rows["b"] + 2


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 3))
def test_endless_new_shares_starve_no_other(before, per_service):
    """A waiting share is served although new shares arrive faster than they are served."""
    queue = FairQueue()
    for number in range(before):
        push(queue, "old", number)
        name, _ = queue.pop()
        queue.finish(name)
    push(queue, "old", before)
    for service in range(200):
        for number in range(per_service):
            push(queue, f"new-{service}-{number}", 0)
        name, _ = queue.pop()
        queue.finish(name)
        if name == "old":
            return
    raise AssertionError("never served")


def test_a_new_share_is_next():
    """This holds for any queue and any history of another share."""
    queue = FairQueue()
    for number in range(50):
        push(queue, "a", number)
    for _ in range(20):
        name, _ = queue.pop()
        queue.finish(name)
    push(queue, "b", 0)
    assert queue.pop() == ("b", 0)


def test_submitting_one_at_a_time_gains_nothing():
    """A share with one item at a time gets no more than a share with many."""
    queue, served = FairQueue(), Counter()
    for number in range(100):
        push(queue, "many", number)
    push(queue, "one", 0)
    for _ in range(40):
        name, _ = queue.pop()
        queue.finish(name)
        served[name] += 1
        if name == "one":
            push(queue, "one", 0)
    assert abs(served["one"] - served["many"]) <= 2


def test_a_yielded_item_goes_first_in_its_share():
    queue = FairQueue()
    for number in range(3):
        push(queue, "a", number)
    first = queue.pop()
    assert not queue.should_yield("a")  # items of its own share do not count
    push(queue, "b", 0)
    assert queue.should_yield("a")
    queue.finish("a")
    queue.push_front(first, "a")
    assert [queue.pop() for _ in range(3)] == [("b", 0), ("a", 0), ("a", 1)]
    assert not queue.should_yield("b")


def test_a_kept_slot_is_for_shares_without_one():
    queue = FairQueue()
    push(queue, "a", 0)
    push(queue, "a", 1)
    queue.pop()
    assert queue.pop(idle_only=True) is None
    push(queue, "b", 0)
    assert queue.pop(idle_only=True) == ("b", 0)


def test_idle_shares_are_dropped():
    queue = FairQueue()
    for number in range(1000):
        push(queue, f"share {number}", 0)
        queue.pop()
        queue.finish(f"share {number}")
    assert len(queue._shares) <= 2


def test_a_waiting_item_can_be_removed():
    queue = FairQueue()
    push(queue, "a", 0)
    push(queue, "b", 0)
    queue.remove(("a", 0))
    assert list(queue) == [("b", 0)]
    queue.clear()
    assert queue.pop() is None


@dataclass(eq=False)
class Wanted:
    """A request for a slot."""

    share: str
    weight: float = 1.0
    in_background: bool = False


def fill(rows: SlotScheduler, *shares: str, in_background: bool = False) -> None:
    for share in shares:
        rows.push(Wanted(share, in_background=in_background))


def taken(rows: SlotScheduler) -> str:
    """The shares that get slots now, in their order."""
    return "".join(request.share for request in iter(rows.pop, None))


def test_shares_get_slots_in_turn():
    rows = SlotScheduler(4)
    fill(rows, *"aaaabc")
    assert taken(rows) == "abca"


def test_the_background_leaves_a_slot_free_and_yields_to_live_requests():
    rows = SlotScheduler(3)
    fill(rows, *"xxyy", in_background=True)
    background = [rows.pop() for _ in range(2)]
    assert [request.share for request in background] == ["x", "y"]
    assert rows.pop() is None
    assert not rows.should_yield(background[0])
    fill(rows, *"aa")
    assert taken(rows) == "a"
    assert rows.should_yield(background[0])
    rows.finish(background[0])
    rows.push_front(background[0])
    assert taken(rows) == "a"


def test_shares_take_turns_in_the_background():
    """However many requests one of them has."""
    rows = SlotScheduler(1)
    fill(rows, *"xxxxyyy", in_background=True)
    order = ""
    while request := rows.pop():
        order += request.share
        rows.finish(request)
    assert order == "xyxyxyx"


def test_slots_are_kept_for_shares_without_one():
    rows = SlotScheduler(3, kept_rows=1)
    fill(rows, *"aaaa")
    assert taken(rows) == "aa"
    fill(rows, *"b")
    assert taken(rows) == "b"
    # The only slot of a batch is not kept free.
    alone = SlotScheduler(1, kept_rows=1)
    fill(alone, "a")
    assert taken(alone) == "a"


def test_a_slot_is_kept_while_several_shares_ask():
    """A lone share has all slots, and again when it has been alone for a minute."""
    now = 0.0
    rows = SlotScheduler(3, kept_beside_others=1, clock=lambda: now)

    def run(*shares: str) -> str:
        fill(rows, *shares)
        running = list(iter(rows.pop, None))
        for request in running:
            rows.finish(request)
        rows.clear()
        return "".join(request.share for request in running)

    assert run(*"aaaa") == "aaa"
    assert run("b") == "b"
    now = 59.0
    assert run(*"aaaa") == "aa"
    now = 61.0
    assert run(*"aaaa") == "aaa"
    # Background requests do not count as another share.
    fill(rows, "c", in_background=True)
    assert run(*"aaaa") == "aaa"


def test_a_slot_is_free_for_the_next_new_share():
    """Once a second share has asked, a flood of the first leaves a slot to the next new share."""
    rows = SlotScheduler(2, kept_beside_others=1, clock=lambda: 0.0)
    fill(rows, *"aaaa")
    flood = [rows.pop() for _ in range(2)]
    fill(rows, "b")
    assert rows.pop() is None
    rows.finish(flood.pop())
    assert taken(rows) == "b"
    rows.finish(Wanted("b"))
    assert taken(rows) == ""
    fill(rows, "c")
    assert taken(rows) == "c"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_long_texts_that_yield_are_finished(texts, num_slots):
    """All parts of all texts are generated; with a slot for each text none yields."""
    rows = SlotScheduler(num_slots)
    parts = {}
    for share, count in texts:
        request = Wanted(share)
        parts[request] = count
        rows.push(request)
    running, num_steps = [], 0
    while any(parts.values()):
        running += iter(rows.pop, None)
        assert running, "a row is idle while requests wait"
        assert len(running) == min(num_slots, sum(count > 0 for count in parts.values()))
        request = running.pop(0)
        parts[request] -= 1
        num_steps += 1
        if not parts[request]:
            rows.finish(request)
        elif rows.should_yield(request):
            assert len(texts) > num_slots
            rows.finish(request)
            rows.push_front(request)
        else:
            running.append(request)
    assert num_steps == sum(count for _, count in texts)
