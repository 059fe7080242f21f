import pytest

from moe_lab.study.timeline import Flight, Parts, RankSteps, by_exchange, parts


def test_wait_and_transfer_by_hand():
    flights = [Flight("dispatch", 0, 1, 5), Flight("dispatch", 3, 3, 6)]
    assert parts(flights) == [Parts(wait=3, transfer=2, exposed=4, hidden=1), Parts(0, 3, 3, 0)]


def test_what_ended_before_it_was_asked_for_is_hidden():
    assert parts([Flight("combine", 2, 9, 4)]) == [Parts(wait=0, transfer=2, exposed=0, hidden=2)]


def test_parts_add_up():
    flights = [Flight("x", 0.0, 2.5, 4.0), Flight("x", 1.0, 1.0, 4.5), Flight("x", 0.5, 6.0, 3.0)]
    for flight, part in zip(flights, parts(flights)):
        assert part.wait + part.transfer == part.exposed + part.hidden == flight.end - flight.arrival
        assert min(part) >= 0


@pytest.mark.parametrize(
    ("flights", "message"),
    [
        ([Flight("a", 0, 0, 1), Flight("b", 0, 0, 1)], r"flights of \['a', 'b'\]: must be one exchange"),
        ([], r"flights of \[\]"),
        ([Flight("a", 0, 0, 1), Flight("a", 2, 2, 3)], "a ends on a rank before all arrived"),
    ],
)
def test_stamps_that_cannot_be_are_refused(flights, message):
    with pytest.raises(ValueError, match=message):
        parts(flights)


def test_exchanges_of_a_step_are_told_apart():
    ranks = [RankSteps((), (Flight("count", r, r, 2), Flight("dispatch", 3, 3, 4 + r))) for r in range(2)]
    found = by_exchange(ranks)
    assert [part.wait for part in found["count"]] == [1, 0]
    assert [part.transfer for part in found["dispatch"]] == [1, 2]
