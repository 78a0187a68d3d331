"""Detectors and thresholds that a calibration gives; and a file that comes back whole or is refused."""

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

from guard.calibration import FORMAT, Calibration
from guard.conformal import JointRanks
from guard.errors import CalibrationError
from guard.growth import Growth
from guard.roles import RoleMap
from guard.scores import BankSpace, Moments
from guard.verdict import DETECTORS, PHASES, DetectorName

from .planted import EVERY, SPACE, calibration, generator, tokens, with_clean

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# -- thresholds and detectors -----------------------------------------------------------------------------------------


def test_ranks_are_of_both_phases_of_the_detectors_that_share_the_rate() -> None:
    some = calibration()
    source = generator(0)
    for detector, phase in EVERY:
        some = with_clean(some, detector, phase, torch.randn(99, generator=source).tolist())
    groups: list[tuple[DetectorName, ...]] = [("density",), ("exceedance", "density"), DETECTORS]
    for names in groups:
        expected = JointRanks({(name, phase): some.clean[name, phase] for name in names for phase in PHASES})
        found = some.ranks(names)
        assert found.supported == expected.supported
        for name in names:
            for phase in PHASES:
                assert found.threshold((name, phase), 0.2) == expected.threshold((name, phase), 0.2)
    # More scores of which none is rare together leave less for each.
    assert some.ranks(groups[0]).rank(0.2) > some.ranks(groups[2]).rank(0.2)


def own_space() -> BankSpace:
    return replace(SPACE, names=tuple(name.replace(".own_", ".").replace(".", ".own_", 1) for name in SPACE.names))


def delta_space() -> BankSpace:
    return replace(SPACE, names=tuple(name.replace(".own_", ".") for name in SPACE.names))


def only(some: Calibration, space: BankSpace, *detectors: str) -> Calibration:
    return replace(
        some,
        space=space,
        clean={key: scores for key, scores in some.clean.items() if key[0] in detectors},
        growth={key: growth for key, growth in some.growth.items() if key[0] in detectors},
    )


OWN_ONLY = only(calibration(), own_space(), "intrinsic", "exceedance")
DELTA_ONLY = only(calibration(), delta_space(), "density", "exceedance")


@pytest.mark.parametrize(
    ("some", "names"),
    [
        (calibration(), ("density", "intrinsic", "exceedance")),
        (OWN_ONLY, ("intrinsic", "exceedance")),
        (DELTA_ONLY, ("density", "exceedance")),
    ],
    ids=["both", "own", "delta"],
)
def test_detectors_are_those_that_the_bank_has_directions_for_in_the_file_too(
    some: Calibration, names: tuple[str, ...], tmp_path: Path
) -> None:
    some.save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    assert loaded.detectors == some.detectors == names
    assert tuple(loaded.shape.detectors(loaded.space)) == names
    assert loaded.clean == some.clean
    assert loaded.digest() == some.digest()


def test_a_detector_without_directions_has_no_ranks() -> None:
    with pytest.raises(CalibrationError, match="no directions for density; it serves intrinsic, exceedance"):
        OWN_ONLY.ranks(("exceedance", "density"))


def test_exceedance_reads_the_models_own_directions_only_where_there_are_no_others() -> None:
    far = tokens(1, 0)
    far.coordinates[:] = 0.0
    far.coordinates[0, 3] = 50.0  # a direction of the model's own
    both = calibration()
    assert float(both.shape.detectors(both.space)["exceedance"].values(far)) < 1
    assert float(OWN_ONLY.shape.detectors(OWN_ONLY.space)["exceedance"].values(far)) > 40


# -- the file ---------------------------------------------------------------------------------------------------------


def whole() -> Calibration:
    some = calibration()
    return replace(some, shape=replace(some.shape, sinks=(0, 3)))


@cache
def saved() -> bytes:
    """The file of `whole()`."""
    with tempfile.TemporaryDirectory() as folder:
        whole().save(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.calibration"
    path.write_bytes(saved())
    return path


def test_what_was_saved_comes_back_exactly(file: Path) -> None:
    saved, loaded = whole(), Calibration.load(file)
    assert loaded.clean == saved.clean
    assert loaded.clean["density", "completion"][0] == -math.inf
    assert (loaded.fingerprint, loaded.space, loaded.target_fpr) == (saved.fingerprint, saved.space, saved.target_fpr)
    assert (loaded.growth, loaded.roles, loaded.facts) == (saved.growth, saved.roles, saved.facts)
    assert loaded.held_out == 99
    assert torch.equal(loaded.shape.low, saved.shape.low)
    assert torch.equal(loaded.shape.high, saved.shape.high)
    assert loaded.shape.sinks == saved.shape.sinks == (0, 3)
    for before, after in zip(saved.shape.decisions, loaded.shape.decisions, strict=True):
        assert before.count == after.count
        assert torch.equal(before.mean, after.mean)
        assert torch.equal(before.covariance, after.covariance)
    assert loaded.digest() == saved.digest()


def test_a_role_that_clean_traffic_did_not_have_comes_back_without_a_range(tmp_path: Path) -> None:
    some = whole()
    some.shape.low[0], some.shape.high[0] = math.inf, -math.inf
    some.save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    assert torch.equal(loaded.shape.low, some.shape.low)
    assert torch.equal(loaded.shape.high, some.shape.high)


def test_a_draft_without_held_out_scores_can_be_saved_and_read(tmp_path: Path) -> None:
    draft = replace(calibration(), clean=dict.fromkeys(EVERY, ()))
    draft.save(tmp_path / "draft")
    loaded = Calibration.load(tmp_path / "draft")
    assert loaded.clean == draft.clean
    assert loaded.held_out == 0


def changed_calibrations() -> dict[str, Calibration]:
    """Copies of one calibration, each with one thing changed a little."""
    some = whole()
    changed = {
        "fingerprint": replace(some, fingerprint="sha256:other"),
        "rate": replace(some, target_fpr=0.11),
        "names": replace(some, space=replace(SPACE, names=(*SPACE.names[:-1], "L5.own_o_proj.u2"))),
        "layers": replace(some, space=replace(SPACE, layers=(1, 4, 6))),
        "facts": replace(some, facts={**some.facts, "dtype": "bfloat16"}),
        "sinks": replace(some, shape=replace(some.shape, sinks=(0, 2))),
        "no sinks": replace(some, shape=replace(some.shape, sinks=())),
        "roles": replace(some, roles=RoleMap((), ((2,),), ((3,),))),
        "unknown roles": replace(some, roles=RoleMap.unknown("no template")),
        "detectors": only(some, SPACE, "density", "exceedance"),
    }
    for detector, phase in EVERY:
        scores = list(some.clean[detector, phase])
        scores[50] += 1e-9
        changed[f"clean {detector} {phase}"] = with_clean(some, detector, phase, scores)
        # The same scores of other requests: alone they are as rare as before, together they are not.
        scores = list(some.clean[detector, phase])
        changed[f"order {detector} {phase}"] = with_clean(some, detector, phase, scores[::-1])
        before = some.growth[detector, phase]
        for name, grown in (("tokens", Growth(before.tokens + 1, before.scale)), ("scale", Growth(before.tokens, 0.4))):
            changed[f"{name} {detector} {phase}"] = replace(some, growth={**some.growth, (detector, phase): grown})
    for name in ("low", "high"):
        tensor = getattr(some.shape, name).clone()
        tensor[1, 0] += 1e-6
        changed[name] = replace(some, shape=replace(some.shape, **{name: tensor}))
    for index, phase in enumerate(PHASES):
        before_moments = some.shape.decisions[index]
        for field in ("count", "mean", "covariance"):
            value = getattr(before_moments, field)
            value = value + 1 if field == "count" else value.clone()
            if field != "count":
                value.view(-1)[3] += 1e-12
            decisions = list(some.shape.decisions)
            decisions[index] = replace(before_moments, **{field: value})
            changed[f"{field} {phase}"] = replace(
                some, shape=replace(some.shape, decisions=(decisions[0], decisions[1]))
            )
    return changed


def test_the_digest_changes_with_everything_that_decides_a_verdict() -> None:
    digests = {name: some.digest() for name, some in changed_calibrations().items()}
    digests["none"] = whole().digest()
    assert whole().digest() == digests["none"]
    assert len(set(digests.values())) == len(digests) == 10 + 4 * 6 + 2 + 6 + 1
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


def within(key: str, *path: str | int, value: object) -> Callable[[object, dict[str, Any]], None]:
    """Put a value deep inside the header."""

    def apply(_: object, metadata: dict[str, Any]) -> None:
        place = metadata[key]
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    return apply


def no_range(tensors: dict[str, torch.Tensor], _: object) -> None:
    tensors["low"].fill_(math.inf)
    tensors["high"].fill_(-math.inf)


def unlike_any_covariance(matrix: torch.Tensor) -> torch.Tensor:
    """Larger off the diagonal than on it."""
    matrix[0, 1] = matrix[1, 0] = 50 * matrix.diagonal().max()
    return matrix


PROMPT_GROWTH = "density.prompt"
WRONG = {
    "low of another width": put("low", lambda t: t[:, :-1]),
    "low of two roles": put("low", lambda t: t[:2]),
    "high that is NaN": put("high", fill_one(math.nan)),
    "high without an end": put("high", fill_one(math.inf)),
    "low without an end": put("low", fill_one(-math.inf)),
    "high of another type": put("high", lambda t: t.double()),
    "no role with a range": no_range,
    "mean with NaN": put("mean.prompt", fill_one(math.nan)),
    "mean that is infinite": put("mean.completion", fill_one(math.inf)),
    "mean of another width": put("mean.completion", lambda t: t[:-1]),
    "mean in float32": put("mean.prompt", lambda t: t.float()),
    "covariance with NaN": put("covariance.prompt", fill_one(math.nan)),
    "covariance that is infinite": put("covariance.prompt", fill_one(math.inf)),
    "covariance of another width": put("covariance.completion", lambda t: t[:, :-1]),
    "covariance in float32": put("covariance.completion", lambda t: t.float()),
    "flat covariance": put("covariance.prompt", lambda t: t.view(-1)),
    "covariance that is none": put("covariance.completion", unlike_any_covariance),
    "covariance that is negative": put("covariance.prompt", lambda t: -t),
    "too few decisions": say("decisions", [7, 60]),
    "no decisions": say("decisions", []),
    "decisions of one phase": say("decisions", [60]),
    "decisions that are none": say("decisions", None),
    "decisions that are negative": say("decisions", [60, -1]),
    "decisions that are fractions": say("decisions", [60.0, 69.0]),
    "decisions that are true": say("decisions", [60, True]),
    "sinks that are texts": say("sinks", ["0"]),
    "sinks that are negative": say("sinks", [-1]),
    "sinks that are one number": say("sinks", 0),
    "clean with NaN": put("clean.density.prompt", fill_one(math.nan)),
    "clean that is infinite": put("clean.density.prompt", fill_one(math.inf)),
    "NaN at the end": put("clean.intrinsic.prompt", lambda t: torch.cat([t, torch.tensor([math.nan])])),
    "clean of other requests": put("clean.exceedance.completion", lambda t: t[:-1]),
    "clean in float32": put("clean.density.prompt", lambda t: t.float()),
    "clean as whole numbers": put("clean.density.prompt", lambda t: t.view(torch.int64)),
    "clean as a table": put("clean.density.prompt", lambda t: t[None]),
    "clean as one number": put("clean.density.prompt", lambda t: t[0]),
    "a format from the future": say("format", FORMAT + 1),
    "the format before": say("format", 1),
    "no format": say("format", None),
    "a detector missing": say("detectors", ["density", "exceedance"]),
    "a detector that is unknown": say("detectors", ["density", "intrinsic", "exceedance", "entropy"]),
    "no detectors": say("detectors", []),
    "detectors that are none": say("detectors", None),
    "names for another bank": say("names", ["d0"]),
    "names of the delta alone": say("names", list(delta_space().names)),
    "names that are not texts": say("names", [*SPACE.names[:-1], 7]),
    "names that are a number": say("names", 9),
    "widths that do not add up": say("widths", [4, 3, 6]),
    "widths that are texts": say("widths", ["4", "3", "5"]),
    "widths that are fractions": say("widths", [4.0, 3.0, 5.0]),
    "negative widths": say("widths", [13, -6, 5]),
    "no layers": say("layers", []),
    "layers without widths": say("layers", [1, 4]),
    "growth that is none": say("growth", None),
    "growth that is a list": say("growth", [1]),
    "growth of one score missing": say("growth", {PROMPT_GROWTH: {"tokens": 1, "scale": 1.0}}),
    "growth without a scale": within("growth", PROMPT_GROWTH, value={"tokens": 4}),
    "growth from no tokens": within("growth", PROMPT_GROWTH, "tokens", value=0),
    "growth from half a token": within("growth", PROMPT_GROWTH, "tokens", value=0.5),
    "growth that is negative": within("growth", PROMPT_GROWTH, "scale", value=-1.0),
    "growth that is NaN": within("growth", PROMPT_GROWTH, "scale", value=math.nan),
    "growth without end": within("growth", PROMPT_GROWTH, "scale", value=math.inf),
    "growth that is text": within("growth", PROMPT_GROWTH, "scale", value="1.0"),
    "roles that are none": say("roles", None),
    "roles without headers": say("roles", {"preamble": None, "reason": ""}),
    "roles with a header of texts": within("roles", "headers", "user", value=[["a"]]),
    "roles with an empty header": within("roles", "headers", "user", value=[[]]),
    "roles that share a header": within("roles", "headers", "user", value=[[3]]),
    "roles of nobody": within("roles", "preamble", value="nobody"),
    "roles both known and not": within("roles", "reason", value="no template"),
    "a rate that is no number": say("target_fpr", "high"),
    "a rate that is NaN": say("target_fpr", math.nan),
    "a rate of one": say("target_fpr", 1.0),
    "a rate beyond floats": say("target_fpr", 10**400),
    "facts that are none": say("facts", None),
    "facts that are a list": say("facts", [1]),
    **{
        f"no {name}": drop_tensor(name)
        for name in ("low", "mean.prompt", "covariance.completion", "clean.exceedance.completion")
    },
    **{
        f"no {key} in the header": drop_key(key)
        for key in (
            *("format", "fingerprint", "layers", "names", "detectors", "decisions", "sinks", "growth", "roles"),
            *("target_fpr", "facts"),
        )
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


def test_any_bit_of_the_header_can_flip_without_another_error(file: Path) -> None:
    content = saved()
    for place in range(8, 8 + int.from_bytes(content[:8], "little"), 3):
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
    ranks = loaded.ranks(loaded.detectors)
    for detector in loaded.detectors:
        for phase in PHASES:
            assert not math.isnan(ranks.threshold((detector, phase), 0.9))
            assert not loaded.growth[detector, phase].allowance(torch.arange(9)).isnan().any()
    assert all(isinstance(name, str) for name in loaded.space.names)
    assert len(loaded.roles.roles([1, 2, 3])) == 3
    for scorer in loaded.shape.detectors(loaded.space).values():
        assert len(scorer.values(tokens(3, 0))) == 3


def test_a_covariance_that_rounding_left_short_of_one_is_used(tmp_path: Path) -> None:
    """Fewer decisions than directions: some directions have no variance, or less than none by rounding."""
    some = whole()
    rows = torch.randn(9, 2 * SPACE.size, generator=generator(0))
    moments = Moments.of(rows)
    moments.covariance.diagonal().sub_(1e-12)
    replace(some, shape=replace(some.shape, decisions=(moments, Moments.of(2 * rows)))).save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    assert loaded.shape.detectors(loaded.space)["density"].values(tokens(3, 0)).isfinite().all()


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
