"""The guard: losses in a request and over requests, suspensions, probes, and its clock."""

from __future__ import annotations

import random

import pytest

from paceline.selection.guard import (
    ALLOWED_LOSS,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LOSES,
    MIN_ALLOWED_LOSS,
    PROBE_SHARE,
    TRUST,
    Guard,
    PlainRoundClock,
)


def request(guard: Guard, arm: str, loss: float, rounds: int = 4, tokens: float = 64.0) -> bool:
    """Run a request whose rounds lose `loss` in all; return whether it kept the arm to its end."""
    losses = guard.begin(arm, tokens)
    fell = False
    for _ in range(rounds):
        if not fell:
            fell = guard.after_round(losses, arm, 2.0 + loss / rounds, 0.0, 2)
    for _ in range(50):
        guard.after_plain(losses, 0.0)
    guard.end(losses)
    return not fell


def plain(guard: Guard, requests: int, rounds: int = 60) -> None:
    for _ in range(requests):
        losses = guard.begin("none", 64.0)
        for _ in range(rounds):
            guard.after_plain(losses, 0.0)
        guard.end(losses)


# --- in a request ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "allowed"), [(64.0, MIN_ALLOWED_LOSS), (400.0, 400 * ALLOWED_LOSS)]
)
def test_a_request_continues_without_an_arm_that_lost_its_share(
    tokens: float, allowed: float
) -> None:
    guard = Guard()
    losses = guard.begin("a", tokens)
    lost = 0.0
    while not guard.after_round(losses, "a", 1.4, 0.0, 1):
        lost += 0.4
    assert lost <= allowed < lost + 0.4 + 1e-9


def test_earlier_gains_may_be_lost_again() -> None:
    guard = Guard()
    losses = guard.begin("a", 64.0)
    assert not any(guard.after_round(losses, "a", 1.2, 0.0, 5) for _ in range(3))
    assert not any(guard.after_round(losses, "a", 1.5, 0.0, 1) for _ in range(20))


def test_an_arm_that_gains_is_not_blamed_for_an_earlier_one() -> None:
    guard = Guard()
    losses = guard.begin("a", 64.0)
    while not guard.after_round(losses, "a", 1.5, 0.0, 1):
        pass
    assert not guard.after_round(losses, "b", 1.5, 0.0, 2)
    assert guard.after_round(losses, "b", 1.5, 0.0, 1)


def test_starts_do_not_stop_a_request_but_count_over_requests() -> None:
    guard = Guard()
    for _ in range(12):
        losses = guard.begin("a", 64.0)
        assert not guard.after_round(losses, "a", 1.0, 3.0, 1)
        guard.end(losses)
    assert not guard.admits("a")


def test_a_trusted_arm_may_lose_more_in_a_request() -> None:
    guard = Guard()
    for _ in range(10):
        assert request(guard, "a", -20.0)
    assert request(guard, "a", MIN_ALLOWED_LOSS * TRUST * 0.95)
    assert not request(guard, "b", MIN_ALLOWED_LOSS * TRUST * 0.95)


# --- over requests --------------------------------------------------------------------------------


def test_an_arm_is_suspended_when_its_requests_lose_with_confidence() -> None:
    guard = Guard()
    needed = 0
    while guard.admits("a"):
        request(guard, "a", 1.0)
        needed += 1
    # the sum of n equal losses is sqrt(n) of its standard errors, a little less as it fades
    assert LOSES**2 < needed <= LOSES**2 + 2
    assert guard.admits("b")
    [line] = guard.report()
    assert line.startswith("a: ") and "suspended" in line


def test_an_arm_that_gains_in_total_stays() -> None:
    """Three requests of four lose a little, the fourth gains more."""
    guard = Guard()
    for i in range(400):
        request(guard, "a", 1.0 if i % 4 else -6.0)
        assert guard.admits("a")


def test_a_noisy_clock_suspends_few_arms_that_gain() -> None:
    order = random.Random(0)
    num_suspended = 0
    for _ in range(50):
        guard = Guard()
        for _ in range(100):
            request(guard, "a", -2.0 + 4.0 * order.gauss(0.0, 1.0))
        num_suspended += not guard.admits("a")
    assert num_suspended <= 3


def suspend(guard: Guard, arm: str) -> None:
    while guard.admits(arm):
        request(guard, arm, 1.0)


def test_failed_probes_lengthen_the_pause() -> None:
    guard = Guard()
    suspend(guard, "a")
    pauses = []
    for _ in range(9):
        waited = 0
        while not guard.admits("a"):
            plain(guard, 1, rounds=3000)
            waited += 1
        pauses.append(waited)
        request(guard, "a", 1.0)
    assert pauses[0] == FIRST_PAUSE
    assert pauses == sorted(pauses)
    assert pauses[2] == 4 * FIRST_PAUSE
    assert pauses[-1] <= LONGEST_PAUSE


def test_one_probe_at_a_time() -> None:
    guard = Guard()
    suspend(guard, "a")
    plain(guard, 2 * FIRST_PAUSE)
    assert guard.admits("a")
    losses = guard.begin("a", 64.0)
    assert not guard.admits("a")
    guard.after_round(losses, "a", 1.5, 0.0, 1)
    guard.end(losses)
    assert not guard.admits("a")


def test_a_probe_that_gains_ends_the_suspension() -> None:
    guard = Guard()
    suspend(guard, "a")
    plain(guard, 2 * FIRST_PAUSE)
    request(guard, "a", -20.0)
    assert guard.admits("a")
    assert "suspended" not in guard.report()[0]


def test_a_probe_without_a_round_leaves_the_arm_to_be_probed() -> None:
    """The request was cancelled, or ended with its first token."""
    guard = Guard()
    suspend(guard, "a")
    plain(guard, 2 * FIRST_PAUSE)
    guard.end(guard.begin("a", 64.0))
    assert guard.admits("a")


def test_probes_lose_no_more_than_their_share() -> None:
    guard = Guard()
    arms = [f"bad {i}" for i in range(12)]
    for arm in arms:
        suspend(guard, arm)
    lost = rounds = 0.0
    for _ in range(3000):
        arm = next((a for a in arms if guard.admits(a)), None)
        if arm is None:
            plain(guard, 1, rounds=58)
            rounds += 58
            continue
        request(guard, arm, 1.4)
        lost, rounds = lost + 1.4, rounds + 58
    assert lost > 0
    assert lost <= PROBE_SHARE * rounds + 1.4 + 1.0


def test_memory_is_constant() -> None:
    guard = Guard()
    for i in range(300):
        request(guard, f"arm {i % 5}", 1.0 if i % 2 else -1.0)
    assert len(guard._records) == 5


# --- the clock ------------------------------------------------------------------------------------


def test_the_factor_is_clocked_over_priced_seconds_of_plain_rounds() -> None:
    clock = PlainRoundClock()
    assert clock.factor == 1.0 and clock.is_due
    for i in range(40):
        clock.add_plain_round(0.013 if i % 2 else 0.011, 0.010)
    assert clock.factor == pytest.approx(1.2, rel=0.02)
    assert not clock.is_due


def test_the_factor_follows_a_slower_machine() -> None:
    clock = PlainRoundClock()
    for seconds in [0.010] * 100 + [0.015] * 200:
        clock.add_plain_round(seconds, 0.010)
    assert clock.factor == pytest.approx(1.5, rel=0.05)


def test_one_interrupted_round_hardly_moves_the_factor() -> None:
    clock = PlainRoundClock()
    for _ in range(100):
        clock.add_plain_round(0.010, 0.010)
    clock.add_plain_round(1.0, 0.010)
    assert clock.factor < 1.06


def test_a_plain_round_is_due_again_after_many_drafted_ones() -> None:
    clock = PlainRoundClock()
    for _ in range(20):
        clock.add_plain_round(0.01, 0.01)
    num_drafted = 0
    while not clock.is_due:
        clock.add_drafted_round()
        num_drafted += 1
    assert 100 <= num_drafted <= 1000
