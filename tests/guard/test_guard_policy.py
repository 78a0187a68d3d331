"""What is done about a verdict, case by case; and what is not a policy."""

from __future__ import annotations

import itertools
import math
import traceback
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from guard.errors import ConfigError
from guard.policy import Action, Mode, Policy, decide
from guard.verdict import DETECTORS, DetectorName

from .planted import a_verdict

MODES: tuple[Mode, ...] = ("off", "monitor", "enforce")


def policy(mode: Mode, **actions: str) -> Policy:
    return Policy.model_validate(
        {"mode": mode, "detections": {name: {"action": what} for name, what in actions.items()}}
    )


@pytest.mark.parametrize("unscorable", [None, "", "a reason"])
@pytest.mark.parametrize("exceeded", [False, True])
@pytest.mark.parametrize("action", ["flag", "steer", "block"])
@pytest.mark.parametrize("mode", MODES)
def test_the_decision_follows_from_mode_action_and_verdict(
    mode: Mode, action: str, exceeded: bool, unscorable: str | None
) -> None:
    verdict = a_verdict(2.0 if exceeded else 0.5)
    decision = decide(policy(mode, density=action), [verdict], unscorable)
    expected: dict[Mode, str] = {"off": "allow", "monitor": "allow", "enforce": "allow"}
    if exceeded:
        expected |= {"monitor": "flag", "enforce": action}
    if unscorable is not None:
        expected |= {"monitor": "flag", "enforce": "block"}
    assert decision.action == expected[mode]
    blamed = mode != "off" and exceeded and unscorable is None
    assert decision.verdict == (verdict if blamed else None)
    assert bool(decision.reason) == (decision.action != "allow")
    if mode != "off" and unscorable is not None:
        assert decision.reason == f"unscorable: {unscorable}"


@given(
    st.lists(st.tuples(st.sampled_from(DETECTORS), st.floats())),
    st.sampled_from(["flag", "steer", "block"]),
    st.one_of(st.none(), st.text()),
)
def test_monitor_never_blocks_and_off_says_nothing(
    scores: list[tuple[DetectorName, float]], action: str, unscorable: str | None
) -> None:
    verdicts = [a_verdict(value, 1.0, detector) for detector, value in scores]
    said = decide(policy("monitor", density=action, exceedance="block"), verdicts, unscorable).action
    assert said in ("allow", "flag")
    assert decide(policy("off", density=action, exceedance="block"), verdicts, unscorable).action == "allow"


@given(st.floats())
def test_nothing_above_a_threshold_passes_where_a_detection_blocks(value: float) -> None:
    decision = decide(policy("enforce", density="block"), [a_verdict(value)])
    assert (decision.action == "allow") == (value <= 1.0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_most_severe_verdict_wins_in_any_order(order: tuple[int, ...]) -> None:
    verdicts = [a_verdict(9.0, detector="exceedance"), a_verdict(2.0, detector="density"), a_verdict(0.1)]
    decision = decide(policy("enforce", density="block", exceedance="flag"), [verdicts[index] for index in order])
    assert decision.action == "block"
    assert decision.verdict == verdicts[1]
    assert "density in the prompt" in decision.reason


@pytest.mark.parametrize(
    ("density", "exceedance", "action"),
    [("steer", "flag", "steer"), ("steer", "block", "block"), ("flag", "steer", "steer"), ("block", "steer", "block")],
)
def test_steering_is_more_than_flagging_and_less_than_blocking(density: str, exceedance: str, action: str) -> None:
    verdicts = [a_verdict(2.0, detector="density"), a_verdict(2.0, detector="exceedance")]
    for order in (verdicts, verdicts[::-1]):
        assert decide(policy("enforce", density=density, exceedance=exceedance), order).action == action


@pytest.mark.parametrize("mode", MODES)
def test_only_enforce_steers(mode: Mode) -> None:
    assert policy(mode, density="flag", exceedance="steer").steers == (mode == "enforce")
    assert not policy(mode, density="flag", exceedance="block").steers


def test_whose_tokens_are_steered_travels_with_the_policy() -> None:
    some = Policy.model_validate(
        {"detections": {"density": {"action": "steer"}}, "steered_roles": ["user", "assistant"]}
    )
    assert Policy.from_wire(some.to_wire()) == some
    assert "steered_roles" not in policy("enforce", density="steer").to_wire()
    for wrong in ([], ["tool"], "user"):
        with pytest.raises(ValidationError):
            Policy.model_validate({"steered_roles": wrong})


def test_a_detector_that_the_policy_does_not_name_decides_nothing() -> None:
    assert decide(policy("enforce", density="block"), [a_verdict(math.nan, detector="exceedance")]).action == "allow"


def test_the_policy_of_one_who_says_nothing_blocks_on_density_at_one_in_a_hundred() -> None:
    default = Policy()
    assert default.mode == "enforce"
    assert {name: (d.action, d.threshold.fpr) for name, d in default.detections.items()} == {"density": ("block", 0.01)}


REFUSED: dict[str, dict[str, Any]] = {
    "an unknown key": {"detection": {}},
    "an unknown mode": {"mode": "observe"},
    "an unknown detector": {"detections": {"entropy": {"action": "block"}}},
    "an unknown action": {"detections": {"density": {"action": "allow"}}},
    "a detection without action": {"detections": {"density": {}}},
    "an unknown key in a detection": {"detections": {"density": {"action": "block", "fpr": 0.1}}},
    "no threshold": {"detections": {"density": {"action": "block", "threshold": {}}}},
    "two thresholds": {"detections": {"density": {"action": "block", "threshold": {"fpr": 0.1, "raw": 1}}}},
    "an unknown threshold": {"detections": {"density": {"action": "block", "threshold": {"p": 0.1}}}},
    "no detection": {"detections": {}},
    **{
        f"a rate of {rate}": {"detections": {"density": {"action": "block", "threshold": {"fpr": rate}}}}
        for rate in (0, 1, -0.1, 2, math.nan, math.inf, "high")
    },
    **{
        f"a raw score of {raw}": {"detections": {"density": {"action": "block", "threshold": {"raw": raw}}}}
        for raw in (math.nan, math.inf, -math.inf)
    },
}


@pytest.mark.parametrize("refused", REFUSED)
def test_what_is_not_a_policy_is_refused(refused: str) -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate(REFUSED[refused])


def test_off_needs_no_detection() -> None:
    assert Policy.model_validate({"mode": "off", "detections": {}}).detections == {}


thresholds = st.one_of(
    st.floats(0, 1, exclude_min=True, exclude_max=True).map(lambda fpr: {"fpr": fpr}),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda raw: {"raw": raw}),
)
policies = st.builds(
    lambda mode, detections: Policy.model_validate({"mode": mode, "detections": detections}),
    st.sampled_from(MODES),
    st.dictionaries(
        st.sampled_from(DETECTORS),
        st.fixed_dictionaries({"action": st.sampled_from(["flag", "steer", "block"]), "threshold": thresholds}),
        min_size=1,
    ),
)


@given(policies)
def test_a_policy_comes_back_from_the_wire_as_it_was_sent(some: Policy) -> None:
    assert Policy.from_wire(some.to_wire()) == some


@settings(deadline=None)
@given(st.text(max_size=40))
def test_a_text_that_is_no_policy_is_refused_without_being_repeated(text: str) -> None:
    sent = f'{{"mode": "canary{text}"'
    with pytest.raises(ConfigError) as caught:
        Policy.from_wire(sent)
    told = "".join(traceback.format_exception(caught.value))
    assert "canary" not in told


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", '{"mode":1}', '{"canary": 1}', '{"mode":"canary"}', "\ud800", "[" * 10_000]
)
def test_a_malformed_policy_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="policy sent with a request is not valid") as caught:
        Policy.from_wire(text)
    assert "canary" not in str(caught.value)


def test_detections_that_name_the_same_rate_share_it_and_those_with_raw_scores_share_none() -> None:
    def rates(**thresholds: dict[str, float]) -> dict[float, tuple[DetectorName, ...]]:
        detections = {name: {"action": "flag", "threshold": threshold} for name, threshold in thresholds.items()}
        return Policy.model_validate({"detections": detections}).shared_rates()

    assert rates(density={"fpr": 0.01}) == {0.01: ("density",)}
    # In alphabetical order, as the engine's status names them, however the policy was written.
    together: tuple[DetectorName, ...] = ("density", "exceedance", "intrinsic")
    assert rates(intrinsic={"fpr": 0.01}, exceedance={"fpr": 0.01}, density={"fpr": 0.01}) == {0.01: together}
    assert rates(intrinsic={"fpr": 0.01}, density={"fpr": 0.02}, exceedance={"fpr": 0.01}) == {
        0.01: ("exceedance", "intrinsic"),
        0.02: ("density",),
    }
    assert rates(intrinsic={"raw": 0.01}, density={"fpr": 0.01}) == {0.01: ("density",)}
    assert rates(intrinsic={"raw": 3.0}) == {}
    assert Policy.model_validate({"mode": "off", "detections": {}}).shared_rates() == {}


@given(policies)
def test_every_detection_has_one_rate_or_a_raw_score(some: Policy) -> None:
    shared = some.shared_rates()
    named = [name for names in shared.values() for name in names]
    assert len(named) == len(set(named))
    for name, detection in some.detections.items():
        assert (name in named) == (detection.threshold.raw is None)
        assert name not in named or name in shared[detection.threshold.fpr or 0]
    assert all(list(names) == sorted(names) for names in shared.values())


def test_actions_are_a_closed_set() -> None:
    actions: set[Action] = {"allow", "flag", "block"}
    assert {
        decide(policy(mode, density=what), [a_verdict(2.0)]).action for mode in MODES for what in ("flag", "block")
    } == actions
