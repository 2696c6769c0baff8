"""What an agent makes of what it hears, order by order."""

import pytest

from gemini_hpc.core import messages as m
from gemini_hpc.core.account import Account
from gemini_hpc.core.state import NUMBERS_OF_A_TERM
from gemini_hpc.core.types import FRESH, changed

SECOND = NUMBERS_OF_A_TERM + 1
"""The first generation of the second term."""

PULL = m.Pull("n0", 1, 1, 0, 5, "n1", 3, 1, 0, 0, 1, 0, 10, 1, 1.0)


def account_in_term(term: int) -> Account:
    account = Account("n0")
    assert account.informs(m.Lead("n0", "n1", term, 0.0, True))
    return account


def join(generation: int) -> m.Join:
    return m.Join("n0", generation, 2, 7, 0, "n1:1")


def test_an_inventory_is_told_once_and_again_when_the_leader_does_not_have_it() -> None:
    account = account_in_term(1)
    assert not account.informs(m.Lead("n0", "n1", 1, 1.0, True))
    assert account.informs(m.Lead("n0", "n1", 1, 2.0, False))
    assert account.informs(m.Lead("n0", "n1", 6, 3.0, True))  # the same node, but another coordinator
    assert account.coordinator == "n1"


def test_what_is_told_of_the_worker_is_what_it_said_last() -> None:
    account = account_in_term(1)
    account.hear(m.WorkerReady("n0", 2, 1000, "n0:1"))
    assert account.role_of(join(1)) == "worker"
    told = account.inventory([(0, 1, 2, 7, 1, 1000, 99)])
    assert (told.worker, told.generation, told.rank, told.built_rank, told.store) == ("busy", 1, 2, 2, "n0:1")
    assert told.held == ((0, 1, 2, 7, 1, 1000, 99),) and told.snapshot_bytes == 1000
    account.hear(m.Parked("n0", 1, "n0:2"))
    assert (account.inventory([]).worker, account.inventory([]).store) == ("idle", "n0:2")
    account.hear(m.WorkerLost("n0", "killed", False))
    assert (account.inventory([]).worker, account.inventory([]).reason) == ("lost", "killed")


def test_a_window_host_counts_while_it_is_connected() -> None:
    account = account_in_term(1)
    account.host_world = 3
    account.hear(m.HostReady("n0", 3, ("n0", "n1")))
    assert account.inventory([]).host
    assert account.role_of(PULL) == "host"
    assert account.role_of(m.Gone("n0", 2, (1,))) == ""  # of a world that is no more
    account.host_world = 0
    told = account.inventory([])
    assert (told.host, told.world, told.members) == (False, 3, ("n0", "n1"))
    assert account.role_of(PULL) == ""


def test_what_is_safe_is_of_this_generation_and_nothing_is_when_the_next_begins() -> None:
    account = account_in_term(1)
    account.role_of(join(2))
    account.role_of(m.Safe("n0", 1, 9))
    assert account.safe_step == FRESH
    account.role_of(m.Safe("n0", 2, 9))
    assert account.safe_step == 9
    assert account.role_of(join(2)) == ""  # said twice
    assert account.safe_step == 9
    assert account.role_of(join(3)) == "worker"
    assert account.safe_step == FRESH


@pytest.mark.parametrize(
    "order",
    [join(1), m.Safe("n0", 1, 9), m.Load("n0", 1, 0, 5, 0, 0, "x", 1), m.RestartWorker("n0", 1), m.Retire("n0", 1)],
)
def test_orders_of_an_earlier_term_are_stale(order: m.Command) -> None:
    assert not account_in_term(1).is_stale(order)
    assert account_in_term(2).is_stale(order)


@pytest.mark.parametrize("order", [join(1), PULL, m.Safe("n0", 1, 9), m.Load("n0", 1, 0, 5, 0, 0, "x", 1)])
@pytest.mark.parametrize("newer", [join(2), changed(PULL, generation=2), m.Safe("n0", 2, 1)])
def test_orders_of_an_older_generation_are_stale(order: m.Command, newer: m.Command) -> None:
    account = account_in_term(1)
    account.role_of(order)
    assert not account.is_stale(order)
    account.role_of(newer)
    assert account.is_stale(order)


@pytest.mark.parametrize(
    "order",
    [
        m.RestartWorker("n0", 2),
        m.Retire("n0", 2),
        m.Load("n0", 2, 0, 5, 0, 0, "x", 1),
        changed(PULL, generation=2, area=0),
    ],
)
def test_what_was_ordered_before_a_generation_is_stale_in_it(order: m.Command) -> None:
    account = account_in_term(1)
    account.role_of(join(1))
    account.role_of(m.Safe("n0", 1, 9))
    assert not account.is_stale(order)
    account.role_of(join(2))
    assert account.is_stale(order)


def test_what_is_pulled_to_a_place_grows_newer_in_a_generation() -> None:
    account = account_in_term(1)
    account.role_of(join(1))
    account.role_of(changed(PULL, step=7))
    assert account.is_stale(changed(PULL, step=5))
    assert not account.is_stale(changed(PULL, step=7)) and not account.is_stale(changed(PULL, step=9))
    assert not account.is_stale(changed(PULL, step=5, half=1 - PULL.half))
    assert not account.is_stale(changed(PULL, step=5, generation=2))


def test_what_ends_an_old_generation_is_never_stale() -> None:
    account = account_in_term(3)
    assert not account.is_stale(m.Abort("n0", 1))
    assert not account.is_stale(join(2 * NUMBERS_OF_A_TERM + 1))
    assert account.role_of(m.Abort("n0", 1)) == "worker"


def test_a_lead_that_was_overtaken_changes_nothing() -> None:
    account = account_in_term(4)
    assert not account.informs(m.Lead("n0", "n1", 1, 0.0, False))
    assert account.is_stale(m.Safe("n0", 4, 1))
