"""LoRA adapters behind the server: a request's evidence has to be of the bank of the model that it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from guard.policy import Policy
from server import cli
from server.app import create_app
from server.upstreams.handshake import HandshakeError, agree

from .conftest import Proxy, settings_for
from .fake_engine import CALIBRATION, FINGERPRINT, MODEL, FakeEngine, Script, status
from .hosting import hosted
from .test_server_answers import CHAT, TEXT, chat_body, text_body

SUPPORT, LEGAL = ("a" * 16, "A" * 16), ("b" * 16, "B" * 16)
OWN = (FINGERPRINT, CALIBRATION)
BANKS: dict[str | None, tuple[str, str]] = {"support": SUPPORT, "legal": LEGAL}


@pytest.fixture
def adapted() -> Iterator[tuple[FakeEngine, Proxy, Proxy, str]]:
    """An engine with two adapters, and a server before it in `enforce` and one in `monitor`."""
    engine = FakeEngine()
    engine.status = status(adapters={"support": SUPPORT, "legal": LEGAL})
    engine.script = Script(banks=BANKS)
    with (
        hosted(engine.app) as upstream,
        hosted(create_app(settings_for(upstream.url)), "on") as enforce,
        hosted(create_app(settings_for(upstream.url, "monitor")), "on") as monitor,
    ):
        yield engine, Proxy(enforce), Proxy(monitor), upstream.url


@pytest.mark.parametrize("model", ["support", "legal", MODEL])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_evidence_of_the_adapters_own_bank_is_believed(
    adapted: tuple[FakeEngine, Proxy, Proxy, str], model: str, path: str
) -> None:
    body = chat_body(model=model) if path == CHAT else text_body(model=model)
    answer = adapted[1].post(path, body)
    assert (answer.status_code, answer.headers["x-undertow-action"]) == (200, "allow")


@pytest.mark.parametrize(
    ("model", "bank"),
    [
        ("support", OWN),
        ("support", LEGAL),
        ("legal", SUPPORT),
        (MODEL, SUPPORT),
        ("support", ("", "")),
        ("support", (SUPPORT[0], LEGAL[1])),
    ],
)
def test_evidence_of_another_bank_than_the_models_is_a_failure(
    adapted: tuple[FakeEngine, Proxy, Proxy, str], model: str, bank: tuple[str, str]
) -> None:
    engine, enforce, monitor, _ = adapted
    engine.script = Script(banks={model: bank})
    assert enforce.post(CHAT, chat_body(model=model)).status_code == 503
    assert enforce.sample("undertow_guard_failures_total", kind="fingerprint", mode="enforce") == 1
    assert monitor.post(CHAT, chat_body(model=model)).headers["x-undertow-action"] == "unguarded"


def test_an_adapter_that_has_no_bank_is_refused_in_enforce_and_told_of_in_monitor(
    adapted: tuple[FakeEngine, Proxy, Proxy, str],
) -> None:
    engine, enforce, monitor, _ = adapted
    engine.script = Script(fault="unscorable", banks=BANKS)
    assert enforce.post(CHAT, chat_body(model="loaded-later")).status_code == 503
    assert enforce.sample("undertow_guard_failures_total", kind="unscorable", mode="enforce") == 1
    assert monitor.post(CHAT, chat_body(model="loaded-later")).headers["x-undertow-action"] == "unguarded"


def test_where_only_adapters_have_banks_the_canary_is_one_of_theirs_and_the_model_itself_is_refused() -> None:
    engine = FakeEngine()
    engine.status = status(fingerprint=None, adapters={"support": SUPPORT})
    engine.script = Script(banks={"support": SUPPORT, MODEL: ("", ""), None: ("", "")})
    with hosted(engine.app) as upstream, hosted(create_app(settings_for(upstream.url)), "on") as host:
        proxy = Proxy(host)
        assert proxy.admin("/readyz").json()["engines"]["main"]["checks"] == {
            "upstream": "ok",
            "guard": "ok",
            "canary": "ok",
        }
        assert proxy.post(CHAT, chat_body(model="support")).status_code == 200
        assert proxy.post(CHAT, chat_body()).status_code == 503


def test_an_adapters_calibration_that_cannot_keep_the_policys_rate_is_named() -> None:
    wanted = Policy.model_validate({"detections": {"density": {"action": "block", "threshold": {"fpr": 0.01}}}})
    agree(status(adapters={"support": SUPPORT}), {"policy": wanted}, None)
    with pytest.raises(HandshakeError, match=r"of worker 0 for adapter `support` supports 0\.02 and above"):
        agree(status(adapters={"support": SUPPORT}, adapters_fpr=0.02), {"policy": wanted}, None)


def test_workers_that_differ_in_their_adapters_are_not_agreed_with() -> None:
    one, other = status(adapters={"support": SUPPORT}), status(adapters={"support": LEGAL})
    both = one.model_copy(update={"workers": (one.workers[0], other.workers[1])})
    with pytest.raises(
        HandshakeError, match=f"do not agree on the adapters: .*support {SUPPORT[0]}.*support {LEGAL[0]}"
    ):
        agree(both, {"policy": Policy()}, None)


def test_the_status_shows_every_adapters_bank(
    adapted: tuple[FakeEngine, Proxy, Proxy, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--engine", adapted[3], "--no-server"]) == 0
    out: Any = capsys.readouterr().out
    assert out.count("adapter support") == out.count(SUPPORT[0]) == out.count(LEGAL[0]) == 2
    adapted[0].status = status(fingerprint=None, adapters={"support": SUPPORT})
    assert cli.main(["status", "--engine", adapted[3], "--no-server"]) == 0
    assert "none: requests that use no adapter cannot be scored" in capsys.readouterr().out
