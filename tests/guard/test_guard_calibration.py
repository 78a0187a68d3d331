"""The promise of a threshold, in simulation; and a file that comes back whole or is refused."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from guard.calibration import Calibration, Shape, conformal_rank, needed_requests, supported_fpr
from guard.errors import CalibrationError
from guard.scores import NEAREST
from guard.verdict import PHASES

from .planted import EVERY, SPACE, calibration, clean_rows, generator, with_clean

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# -- the promise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fpr", "requests"), [(0.002, 999), (0.01, 199), (0.01, 700), (0.05, 300)])
@pytest.mark.parametrize("dependence", [0.0, 0.9, 1.0])
def test_the_mean_false_positive_rate_over_calibrations_stays_within_what_was_asked(
    fpr: float, requests: int, dependence: float
) -> None:
    """Split conformal's promise is about the draw of calibration and test requests together, over either phase."""
    draws, fresh = 300, 2000
    source = generator(int(1e6 * fpr) + requests)

    def scores(count: int) -> torch.Tensor:
        first, second = torch.randn(2, count, generator=source, dtype=torch.float64)
        return torch.stack([first, dependence * first + math.sqrt(1 - dependence**2) * second]).exp()

    some, rates = calibration(), []
    for _ in range(draws):
        drawn = scores(requests).sort(dim=1).values
        for phase, values in zip(PHASES, drawn.tolist(), strict=True):
            some = with_clean(some, "density", phase, values)
        thresholds = torch.tensor([some.threshold("density", phase, fpr) for phase in PHASES], dtype=torch.float64)
        rates.append(float((scores(fresh) > thresholds[:, None]).any(dim=0).double().mean()))
    observed = torch.tensor(rates)
    error = float(observed.std()) / math.sqrt(draws)
    assert float(observed.mean()) <= fpr + 3 * error
    # And the rate that was granted is used, as far as ranks allow: a threshold of infinity would keep the promise too.
    granted = conformal_rank(requests, fpr) / (requests + 1)
    least = granted if dependence == 1.0 else granted * 1.2
    assert float(observed.mean()) >= least - 4 * error


@pytest.mark.parametrize("requests", [1, 19, 99, 1000])
def test_a_threshold_is_the_held_out_score_that_leaves_half_of_the_rate_above_it(requests: int) -> None:
    scores = tuple(float(index) for index in range(requests))
    some = with_clean(calibration(), "density", "prompt", scores)
    for fpr in (supported_fpr(requests), 0.5, 0.9):
        if fpr < supported_fpr(requests):
            continue
        threshold = some.threshold("density", "prompt", fpr)
        at_least = sum(score >= threshold for score in scores)
        assert at_least / (requests + 1) <= fpr / 2 + 1e-12
        assert (at_least + 1) / (requests + 1) > fpr / 2


@given(st.lists(st.floats(1e-3, 1, exclude_max=True), min_size=2, max_size=8))
def test_a_larger_rate_never_has_a_higher_threshold(rates: list[float]) -> None:
    some = calibration(requests=2001)
    for detector, phase in EVERY:
        thresholds = [some.threshold(detector, phase, rate) for rate in sorted(rates)]
        assert thresholds == sorted(thresholds, reverse=True)


def test_a_rate_that_the_data_cannot_keep_says_how_many_requests_it_needs() -> None:
    some = calibration(requests=99)
    assert some.threshold("density", "prompt", 0.02) == 99.0
    with pytest.raises(CalibrationError, match=r"0\.01 for density needs 199 .* has 99 and supports 0\.02 or more"):
        some.threshold("density", "prompt", 0.01)


def test_a_rate_is_supported_by_the_phase_with_the_fewest_requests() -> None:
    some = with_clean(calibration(requests=99), "density", "completion", [1.0] * 9)
    assert some.supported_fpr("density") == pytest.approx(0.2)
    assert some.supported_fpr("exceedance") == pytest.approx(0.02)


@given(st.floats(1e-5, 1, exclude_max=True))
def test_needed_requests_support_the_rate_and_one_fewer_does_not(fpr: float) -> None:
    needed = needed_requests(fpr)
    assert conformal_rank(needed, fpr) >= 1
    assert needed == 1 or conformal_rank(needed - 1, fpr) == 0
    assert supported_fpr(needed) <= fpr * (1 + 1e-8)


@given(st.integers(1, 100_000))
def test_the_supported_rate_needs_exactly_the_requests_it_came_from(requests: int) -> None:
    fpr = supported_fpr(requests)
    assert needed_requests(fpr) == requests
    assert conformal_rank(requests, fpr) == 1


def test_no_requests_support_no_rate() -> None:
    assert supported_fpr(0) == 1.0
    with pytest.raises(CalibrationError, match="has 0"):
        with_clean(calibration(), "density", "prompt", ()).threshold("density", "prompt", 0.99)


# -- the shape --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [0, 1])
def test_a_phase_with_too_few_references_is_refused_by_name(phase: int) -> None:
    references = [clean_rows(20, 0), clean_rows(20, 1)]
    references[phase] = references[phase][:NEAREST]
    low, high = torch.zeros(2, SPACE.size), torch.ones(2, SPACE.size)
    with pytest.raises(CalibrationError, match=f"gave 3 {PHASES[phase]} references; more than 3"):
        Shape.fit(SPACE, low, high, (references[0], references[1]))


# -- the file ---------------------------------------------------------------------------------------------------------


@cache
def saved() -> bytes:
    """The file of `calibration()`."""
    with tempfile.TemporaryDirectory() as folder:
        calibration().save(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.calibration"
    path.write_bytes(saved())
    return path


def test_what_was_saved_comes_back_exactly(file: Path) -> None:
    saved, loaded = calibration(), Calibration.load(file)
    assert loaded.clean == saved.clean
    assert loaded.clean["density", "completion"][0] == -math.inf
    assert (loaded.fingerprint, loaded.space, loaded.target_fpr) == (saved.fingerprint, saved.space, saved.target_fpr)
    assert loaded.facts == saved.facts
    assert torch.equal(loaded.shape.low, saved.shape.low)
    assert torch.equal(loaded.shape.high, saved.shape.high)
    assert torch.equal(loaded.shape.scales, saved.shape.scales)
    for before, after in zip(saved.shape.references, loaded.shape.references, strict=True):
        assert torch.equal(before, after)
    assert loaded.digest() == saved.digest()


def test_a_draft_without_held_out_scores_can_be_saved_and_read(tmp_path: Path) -> None:
    draft = replace(calibration(), clean=dict.fromkeys(EVERY, ()))
    draft.save(tmp_path / "draft")
    assert Calibration.load(tmp_path / "draft").clean == draft.clean


def changed_calibrations() -> dict[str, Calibration]:
    """Copies of one calibration, each with one thing changed a little."""
    some = calibration()
    changed = {
        "fingerprint": replace(some, fingerprint="sha256:other"),
        "rate": replace(some, target_fpr=0.11),
        "names": replace(some, space=replace(SPACE, names=(*SPACE.names[:-1], "x"))),
        "layers": replace(some, space=replace(SPACE, layers=(1, 4, 6))),
        "facts": replace(some, facts={**some.facts, "dtype": "bfloat16"}),
    }
    for detector, phase in EVERY:
        scores = list(some.clean[detector, phase])
        scores[50] += 1e-9
        changed[f"clean {detector} {phase}"] = with_clean(some, detector, phase, scores)
    for name in ("low", "high", "scales"):
        tensor = getattr(some.shape, name).clone()
        tensor[1, 0] += 1e-6
        changed[name] = replace(some, shape=replace(some.shape, **{name: tensor}))
    for index in (0, 1):
        references = [rows.clone() for rows in some.shape.references]
        references[index][3, 4] += 1e-6
        changed[f"references {index}"] = replace(
            some, shape=replace(some.shape, references=(references[0], references[1]))
        )
    return changed


def test_the_digest_changes_with_everything_that_decides_a_verdict() -> None:
    digests = {name: some.digest() for name, some in changed_calibrations().items()}
    digests["none"] = calibration().digest()
    assert len(set(digests.values())) == len(digests) == 15
    assert all(digest.startswith("sha256:") for digest in digests.values())


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> None:
    """Change a file's tensors and metadata in place, keeping it proper safetensors."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["undertow"])
    change(tensors, metadata)
    save_file(tensors, file, metadata={"undertow": json.dumps(metadata)})


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor], object], None]:
    def apply(tensors: dict[str, torch.Tensor], _: object) -> None:
        tensors[name] = change(tensors[name].clone()).contiguous()

    return apply


def say(key: str, value: object) -> Callable[[object, dict[str, Any]], None]:
    def apply(_: object, metadata: dict[str, Any]) -> None:
        metadata[key] = value

    return apply


def drop_tensor(name: str) -> Callable[[dict[str, torch.Tensor], object], object]:
    return lambda tensors, _: tensors.pop(name)


def drop_key(key: str) -> Callable[[object, dict[str, Any]], object]:
    return lambda _, metadata: metadata.pop(key)


def fill_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return apply


WRONG = {
    "low of another width": put("low", lambda t: t[:, :-1]),
    "low of one phase": put("low", lambda t: t[:1]),
    "high that is NaN": put("high", fill_one(math.nan)),
    "high that is infinite": put("high", fill_one(math.inf)),
    "high of another type": put("high", lambda t: t.double()),
    "scales of whole numbers": put("scales", lambda t: t.view(torch.int32)),
    "scales that are zero": put("scales", fill_one(0.0)),
    "scales of another layer": put("scales", lambda t: torch.cat([t, t], dim=1)),
    "references with NaN": put("references.prompt", fill_one(math.nan)),
    "references of another width": put("references.completion", lambda t: t[:, :-1]),
    "references without rows": put("references.completion", lambda t: t[:0]),
    "too few references": put("references.completion", lambda t: t[:NEAREST]),
    "flat references": put("references.prompt", lambda t: t.view(-1)),
    "clean with NaN": put("clean.density.prompt", fill_one(math.nan)),
    "NaN at the end": put("clean.density.prompt", lambda t: torch.cat([t, torch.tensor([math.nan])])),
    "unsorted clean": put("clean.exceedance.completion", lambda t: t.flip(0)),
    "clean in float32": put("clean.density.prompt", lambda t: t.float()),
    "clean as whole numbers": put("clean.density.prompt", lambda t: t.view(torch.int64)),
    "clean as a table": put("clean.density.prompt", lambda t: t[None]),
    "clean as one number": put("clean.density.prompt", lambda t: t[0]),
    "a format from the future": say("format", 2),
    "no format": say("format", None),
    "names for another bank": say("names", ["d0"]),
    "names that are not texts": say("names", [*SPACE.names[:-1], 7]),
    "names that are a number": say("names", 9),
    "widths that do not add up": say("widths", [3, 2, 5]),
    "widths that are texts": say("widths", ["3", "2", "4"]),
    "widths that are fractions": say("widths", [3.0, 2.0, 4.0]),
    "negative widths": say("widths", [12, -7, 4]),
    "no layers": say("layers", []),
    "layers without widths": say("layers", [1, 4]),
    "a rate that is no number": say("target_fpr", "high"),
    "a rate that is NaN": say("target_fpr", math.nan),
    "a rate of one": say("target_fpr", 1.0),
    "a rate beyond floats": say("target_fpr", 10**400),
    "facts that are none": say("facts", None),
    "facts that are a list": say("facts", [1]),
    **{
        f"no {name}": drop_tensor(name)
        for name in ("low", "scales", "references.prompt", "clean.exceedance.completion")
    },
    **{
        f"no {key} in the header": drop_key(key)
        for key in ("format", "fingerprint", "layers", "names", "target_fpr", "facts")
    },
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_not_a_whole_calibration_is_refused_by_name(file: Path, wrong: str) -> None:
    rewrite(file, WRONG[wrong])
    with pytest.raises(CalibrationError, match=r"some\.calibration"):
        Calibration.load(file)


@pytest.mark.parametrize("metadata", [None, {}, {"other": "x"}, {"undertow": "{"}, {"undertow": "[]"}])
def test_other_safetensors_files_are_refused(file: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(CalibrationError, match=r"some\.calibration: not a calibration file"):
        Calibration.load(file)


@pytest.mark.parametrize("text", ['{"format": ' + 9999 * "1" + "}", 9999 * '{"a":' + "1" + 9999 * "}"])
def test_a_header_that_python_cannot_read_is_refused(file: Path, text: str) -> None:
    save_file(load_file(file), file, metadata={"undertow": text})
    with pytest.raises(CalibrationError, match=r"some\.calibration"):
        Calibration.load(file)


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 8, b"\xff" * 64, b"not safetensors at all"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    for path in (tmp_path / "other", tmp_path / "absent", tmp_path):
        with pytest.raises(CalibrationError, match=path.name):
            Calibration.load(path)


@FUZZ
@given(data=st.data())
def test_a_file_with_changed_bytes_loads_or_is_refused_and_never_anything_else(file: Path, data: st.DataObject) -> None:
    content = bytearray(saved())
    header = 8 + int.from_bytes(content[:8], "little")
    # Half of the changes meet the header, where they do most.
    position = st.one_of(st.integers(0, header - 1), st.integers(0, len(content) - 1))
    for place, value in data.draw(st.dictionaries(position, st.integers(0, 255), min_size=1, max_size=3)).items():
        content[place] = value
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    file.write_bytes(content[:cut])
    _load_or_refuse(file)


def test_every_bit_of_the_header_can_flip_without_another_error(file: Path) -> None:
    content = saved()
    for place in range(8, 8 + int.from_bytes(content[:8], "little")):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 5)
        file.write_bytes(flipped)
        _load_or_refuse(file)


def _load_or_refuse(file: Path) -> None:
    """What loads can be used: it gives thresholds or refuses a rate, and its detectors score."""
    try:
        loaded = Calibration.load(file)
    except CalibrationError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert str(file) in refusal
        return
    for detector, phase in EVERY:
        assert not math.isnan(loaded.threshold(detector, phase, 0.5))
    assert all(isinstance(name, str) for name in loaded.space.names)
    for scorer in loaded.shape.detectors(loaded.space).values():
        assert len(scorer.score(clean_rows(3, 0), torch.tensor([0, 1, 1])).values) == 3


def test_nothing_is_half_written_where_the_folder_is_missing_or_the_path_is_one(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "file", tmp_path):
        with pytest.raises(CalibrationError, match=path.name):
            calibration().save(path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("guard.atomic.os.replace", fail)
    with pytest.raises(CalibrationError, match="No space left"):
        replace(calibration(), target_fpr=0.2).save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
