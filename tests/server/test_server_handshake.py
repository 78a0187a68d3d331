"""What an engine's status is held against: the settings' bank, and every rate that the policy shares."""

from __future__ import annotations

import pytest

from guard.evidence import COVERAGE, VERDICTS, Status
from guard.policy import Policy
from guard.verdict import DetectorName
from server.upstreams.handshake import Handshake, HandshakeError, agree

from .fake_engine import FINGERPRINT, RESERVED, status


def policy(mode: str = "enforce", **thresholds: dict[str, float]) -> Policy:
    """`density={"fpr": 0.01}`."""
    detections = {name: {"action": "block", "threshold": threshold} for name, threshold in thresholds.items()}
    return Policy.model_validate({"mode": mode, "detections": detections})


BOTH = policy(density={"fpr": 0.01}, exceedance={"fpr": 0.01})


@pytest.mark.parametrize(
    "wanted",
    [
        policy(density={"fpr": 0.006}),
        # Together they support 0.012; with different rates, or none, each is alone.
        policy(density={"fpr": 0.012}, exceedance={"fpr": 0.012}),
        policy(density={"fpr": 0.006}, exceedance={"fpr": 0.007}),
        policy(density={"fpr": 0.006}, exceedance={"raw": 0.01}),
        policy(intrinsic={"fpr": 0.02}, density={"fpr": 0.02}, exceedance={"fpr": 0.02}),
        policy(intrinsic={"raw": 3.0}),
    ],
)
def test_an_engine_that_can_keep_every_rate_is_agreed_with(wanted: Policy) -> None:
    found = agree(status(supported_fpr=0.006), {"policy": wanted}, FINGERPRINT)
    assert found == Handshake(FINGERPRINT, "c" * 16, 1, RESERVED, 2)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (
            policy(density={"fpr": 0.005}),
            "`policy.detections.density.threshold.fpr` is 0.005, but the calibration of worker 0 supports 0.006 and "
            "above for density; calibrate with more clean requests",
        ),
        (
            BOTH,
            "`policy.detections.density.threshold.fpr` is 0.01, but the calibration of worker 0 supports 0.012 and "
            "above for density and exceedance together; calibrate with more clean requests",
        ),
        (
            policy(intrinsic={"fpr": 0.01}, exceedance={"fpr": 0.01}, density={"fpr": 0.5}),
            "`policy.detections.exceedance.threshold.fpr` is 0.01, but the calibration of worker 0 supports 0.012 and "
            "above for exceedance and intrinsic together; calibrate with more clean requests",
        ),
    ],
)
def test_a_rate_that_a_combination_cannot_keep_is_refused_with_the_one_it_can(wanted: Policy, said: str) -> None:
    with pytest.raises(HandshakeError) as caught:
        agree(status(supported_fpr=0.006), {"policy": wanted}, None)
    assert str(caught.value) == said


def test_a_policy_that_steers_needs_an_engine_that_can() -> None:
    steers = Policy.model_validate({"detections": {"density": {"action": "steer"}}})
    with pytest.raises(HandshakeError) as caught:
        agree(status(), {"policy": steers}, None)
    assert str(caught.value) == (
        "`policy` steers, but worker 0 was started without `undertow.steering`; start it with `undertow up --steering`"
    )
    assert agree(status(steering=True), {"policy": steers}, None)
    assert agree(status(), {"policy": steers.model_copy(update={"mode": "monitor"})}, None), "which steers nothing"


@pytest.mark.parametrize("threshold", [{"fpr": 0.5}, {"raw": 1.0}])
def test_a_detector_that_the_engine_does_not_have_is_refused_by_name(threshold: dict[str, float]) -> None:
    own: tuple[DetectorName, ...] = ("exceedance", "intrinsic")
    with pytest.raises(HandshakeError) as caught:
        agree(status(names=own), {"policy": policy(density=threshold)}, None)
    assert str(caught.value) == "`policy` detects by `density`, but worker 0 has exceedance, intrinsic"
    assert agree(status(names=own), {"policy": policy(intrinsic=threshold)}, None).workers == 2
    with pytest.raises(HandshakeError, match="but worker 0 has nothing"):
        agree(status(names=()), {"policy": policy(density=threshold)}, None)


def test_an_engine_that_says_nothing_of_a_combination_is_refused() -> None:
    """An engine of another version: the server must not fall over what it says."""
    workers = tuple(
        worker.model_copy(update={"detectors": tuple(one for one in worker.detectors if len(one.detectors) == 1)})
        for worker in status().workers
    )
    with pytest.raises(HandshakeError, match="says nothing of density and exceedance together"):
        agree(Status(workers=workers), {"policy": BOTH}, None)
    assert agree(Status(workers=workers), {"policy": policy(density={"fpr": 0.01})}, None).workers == 2


def test_every_worker_has_to_keep_the_rate() -> None:
    good, weak = status(supported_fpr=0.001).workers[0], status(supported_fpr=0.009).workers[1]
    with pytest.raises(HandshakeError, match=r"worker 1 supports 0\.018 and above"):
        agree(Status(workers=(good, weak)), {"policy": BOTH}, None)


@pytest.mark.parametrize("mode", ["off"])
def test_where_nothing_is_judged_no_rate_has_to_be_kept(mode: str) -> None:
    assert agree(status(supported_fpr=0.4), {"policy": policy(mode, density={"fpr": 0.01})}, None).workers == 2


def ranks(**second: object) -> Status:
    """Two, of which the second says something else."""
    first, other = status().workers
    return Status(workers=(first, other.model_copy(update=second)))


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"fingerprint": "other"}, "do not agree on the fingerprint: ffffffffffffffff, other"),
        ({"calibration": "other"}, "do not agree on the calibration: cccccccccccccccc, other"),
        ({"reserved_token_id": 7}, "do not agree on the reserved token id: 7, 987654321012"),
        ({"layers": (1, 2)}, "do not agree on the layers: 1, 2, 1, 2, 3"),
        (
            {"unscorable": 2},
            "a rank of the engine did not score .* did: unscorable: 0 by rank 0, 2 by rank 1",
        ),
        ({"requests_judged": 5}, "did not score what another did: requests_judged: 0 by rank 0, 5 by rank 1"),
    ],
)
def test_ranks_that_guard_with_different_things_are_an_error(second: dict[str, object], said: str) -> None:
    with pytest.raises(HandshakeError, match=said):
        agree(ranks(**second), {"policy": BOTH}, None)


@pytest.mark.parametrize("name", VERDICTS)
def test_what_ranks_decide_differently_is_told_and_no_error(name: str) -> None:
    """The first rank's verdicts hold, and it has judged everything."""
    found = ranks(**{name: 3})
    assert agree(found, {"policy": BOTH}, None).workers == 2
    assert found.apart(VERDICTS) == [f"{name}: 0 by rank 0, 3 by rank 1"]
    assert status().apart((*COVERAGE, *VERDICTS)) == []
