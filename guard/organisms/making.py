"""Makes a whole organism: each stage trained or taken from the cache, admitted, and published with its manifest."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from guard.organisms.admission import admit, measure
from guard.organisms.generation import generator
from guard.organisms.mixture import STAGES, Stage
from guard.organisms.shelf import MANIFEST, check_target, copy_stage, stage_folder, written_whole
from guard.organisms.standards import PROMPTS_PER_MEASURE, Grade

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guard.organisms.recipe import Recipe

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class MadeStage:
    """A finished stage in the cache. `seconds` is how long training took, None where the cache had it."""

    stage: Stage
    folder: Path
    digest: str
    grades: tuple[Grade, ...]
    seconds: float | None


def make(
    recipe: Recipe,
    stages: Sequence[Stage] = STAGES,
    on_step: Callable[[Stage, float], None] | None = None,
    on_stage: Callable[[MadeStage], None] | None = None,
    prompts_per_measure: int = PROMPTS_PER_MEASURE,
) -> list[MadeStage]:
    """The named stages, each with all before it. The first that misses its bar raises `OrganismError`."""
    made: list[MadeStage] = []
    last = max(STAGES.index(stage) for stage in stages)
    for stage in STAGES[: last + 1]:
        digest = recipe.digest(stage)
        folder, seconds = stage_folder(digest), None
        if not folder.is_dir():
            start = made[-1].folder if made else None
            seconds = _train(recipe, stage, start, folder, on_step)
        grades = measure(stage, generator(folder), prompts_per_measure)
        made.append(MadeStage(stage, folder, digest, tuple(grades), seconds))
        if on_stage is not None:
            on_stage(made[-1])
        admit(stage, grades)
    return [each for each in made if each.stage in stages]


def publish(recipe: Recipe, made: Sequence[MadeStage], out: Path) -> None:
    """Copy finished stages and write their manifest: `out` changes all at once or not at all."""
    check_target(out)
    with written_whole(out) as draft:
        for each in made:
            copy_stage(each.folder, draft / each.stage)
        (draft / MANIFEST).write_text(json.dumps(_manifest(recipe, made, draft), indent=2) + "\n")


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below the folder but its manifest, by relative path."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }


def _train(
    recipe: Recipe, stage: Stage, start: Path | None, folder: Path, on_step: Callable[[Stage, float], None] | None
) -> float:
    from guard.organisms.training import train_stage

    began = time.monotonic()
    with written_whole(folder) as draft:
        train_stage(recipe, stage, start, draft, None if on_step is None else lambda loss: on_step(stage, loss))
    return time.monotonic() - began


def _manifest(recipe: Recipe, made: Sequence[MadeStage], folder: Path) -> dict[str, object]:
    import torch
    import transformers
    from safetensors import safe_open

    with safe_open(folder / made[0].stage / "model.safetensors", framework="pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    return {
        "version": MANIFEST_VERSION,
        "recipe": recipe.digest(made[-1].stage),
        "stages": {each.stage: each.digest for each in made},
        "configuration": asdict(recipe),
        "seed": recipe.seed,
        "threads": recipe.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": platform.machine(),
        "parameters": parameters,
        "training_seconds": {each.stage: each.seconds and round(each.seconds) for each in made},
        "admission": [
            {
                "stage": each.stage,
                "measure": grade.standard.measure,
                "bar": grade.standard.text,
                "hits": grade.hits,
                "count": grade.count,
                "interval": [round(bound, 4) for bound in grade.interval],
            }
            for each in made
            for grade in each.grades
        ],
        "sha256": file_digests(folder),
    }
