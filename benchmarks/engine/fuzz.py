"""A differential fuzz of the engine: whatever vLLM does, every token has the score that the model alone gives.

    python -m benchmarks.engine.fuzz --model DIR --bank FILE --calibration FILE --requests 2000 --json OUT

Requests are random: shared prefixes, lengths, sampling, several choices, arrivals and aborts. The engine is made hard:
a KV space so small that requests are preempted, prompts in chunks, the prefix cache, n-gram speculation or scheduling
ahead. Then each sequence is read again, alone and whole, by transformers, and held against what the engine scored:

- coverage: every token that entered the model has a score, by a probe or from the cache, and no other token has one;
- readings: cosines, writings and lengths of each computed token; exceedances of each recalled one;
- verdicts: the largest score of each detector and phase; blocked where and only where it is over the threshold, and
  nothing generated after it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import platform
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.engine.noted import Noted
from guard.atomic import write_atomically
from guard.bank import Bank
from guard.calibration import Calibration
from guard.engine.offline import OfflineEngine
from guard.engine.readings import Readings
from guard.engine.runner import Rows
from guard.engine.step import Scorer
from guard.errors import EngineError, ResultsError
from guard.evaluation.reading import Reader
from guard.evidence import POLICY_ARGUMENT, Evidence, Record
from guard.organisms import prompts as organism_prompts
from guard.policy import Policy
from guard.roles import RoleMap
from guard.scores import BankSpace
from guard.verdict import Score

BLOCK = 32
TOLERANCE = 1e-4

SMALL: dict[str, Any] = {
    "max_num_batched_tokens": 48,
    "max_num_seqs": 12,
    "max_model_len": 256,
    "block_size": BLOCK,
    "num_gpu_blocks_override": 18,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
}
PROFILES: dict[str, dict[str, Any]] = {
    "cache": SMALL,
    "ahead": {**SMALL, "async_scheduling": True},
    "speculation": {
        **SMALL,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 2,
        },
    },
}
"""vLLM's options, in the order that they run in: the drafter loads a library that vLLM 0.32 trips over when it starts
again in one process. 18 blocks of 32 tokens hold about four of the requests below; twelve are let in."""

WATCH = Policy.model_validate(
    {"mode": "monitor", "detections": {"density": {"action": "flag", "threshold": {"raw": 1e9}}}}
)
BLOCK_POLICY = Policy.model_validate(
    {"mode": "enforce", "detections": {"density": {"action": "block", "threshold": {"fpr": 0.05}}}}
)


@dataclass(slots=True)
class Observed:
    """What the engine knew of one sequence."""

    prompt: tuple[int, ...]
    enforced: bool
    reserved: int
    noted: Noted = field(default_factory=Noted)
    generated: tuple[int, ...] = ()
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What one run showed."""

    profile: str
    requests: int
    sequences: int
    aborted: int
    blocked: int
    tokens: int
    recalled: int
    preemptions: int
    accepted_guesses: int
    behind_the_end: int
    """Rows that an engine which schedules ahead computed of sequences that were over."""
    worst: Mapping[str, float]
    """The largest differences from the model alone."""
    faults: tuple[str, ...]


def run(model: Path, bank: Path, calibration: Path, profile: str, requests: int, seed: int) -> Found:
    """One engine, so many requests."""
    observed: dict[str, Observed] = {}
    options = {**PROFILES[profile], "worker_cls": "benchmarks.engine.watched.WatchedWorker"}
    with (
        _ahead_if_asked(),
        tempfile.TemporaryDirectory() as folder,
        OfflineEngine(
            model, bank, calibration, dtype="float32", eager=True, own_process=not _v2(), extra=options
        ) as engine,
    ):
        aborted = _drive(engine, observed, requests, seed)
        file = Path(folder) / "noted"
        engine._llm.collective_rpc("fuzz_write", args=(str(file),))
        noted, counts = pickle.loads(file.read_bytes())  # noqa: S301  (our own child wrote it a moment ago)
    if bool(counts["ahead"]) != ("async_scheduling" in PROFILES[profile]):
        raise EngineError(f"the profile {profile} does not do what it is there for")
    for name, each in observed.items():
        each.noted = noted.get(name, each.noted)
    judged = [each for each in observed.values() if each.record is not None]
    worst, faults = _compare(model, Bank.load(bank), Calibration.load(calibration), judged)
    return Found(
        profile=profile,
        requests=requests,
        sequences=len(judged),
        aborted=aborted,
        blocked=sum(each.record is not None and each.record.action == "block" for each in judged),
        tokens=sum(len(each.noted.computed) + len(each.noted.recalled) for each in judged),
        recalled=sum(len(each.noted.recalled) for each in judged),
        preemptions=counts["preemptions"],
        accepted_guesses=counts.get("guesses", 0),
        behind_the_end=counts["behind the end"],
        worst=worst,
        faults=tuple(faults),
    )


def _v2() -> bool:
    """Whether this process was made to take vLLM's V2 model runner; another that it starts would not be."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


@contextmanager
def _ahead_if_asked() -> Iterator[None]:
    """vLLM's CPU platform switches asynchronous scheduling off, as being of no use there. It works all the same, and
    where it is of use there is no CI."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def keep(platform: Any, config: Any) -> None:
        asked = bool(config.scheduler_config.async_scheduling)
        update(platform, config)
        config.scheduler_config.async_scheduling = asked

    with mock.patch.object(CpuPlatform, "check_and_update_config", classmethod(keep)):
        yield


# -- the engine -------------------------------------------------------------------------------------------------------


def _drive(engine: OfflineEngine, observed: dict[str, Observed], requests: int, seed: int) -> int:
    """Returns how many requests were aborted."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    chance = random.Random(seed)
    llm = engine._llm.llm_engine
    reserved = json.loads(engine._llm.collective_rpc("undertow_status")[0])["worker"]["reserved_token_id"]
    asked = _Prompts(engine._llm.get_tokenizer(), chance)
    aborted = 0
    alive: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    sent = 0
    with tqdm(total=requests, unit="request", file=sys.stderr) as bar:
        while sent < requests or llm.has_unfinished_requests():
            for _ in range(chance.choice((0, 0, 1, 2, 6)) if alive else 2):
                if sent == requests:
                    break
                enforced = chance.random() < 0.4
                policy = BLOCK_POLICY if enforced else WATCH
                greedy = chance.random() < 0.6
                parameters = SamplingParams(
                    temperature=0.0 if greedy else 1.0,
                    n=1 if greedy else chance.choice((1, 1, 2, 3)),
                    max_tokens=chance.choice((1, 2, 8, 24, 60)),
                    ignore_eos=chance.random() < 0.3,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    logprobs=chance.choice((None, None, 3)),
                    stop_token_ids=[reserved],
                    extra_args={POLICY_ARGUMENT: policy.to_wire()},
                )
                name = str(sent)
                ids = asked.draw()
                llm.add_request(name, {"prompt_token_ids": ids}, parameters)
                alive[name] = chance.randint(1, 40) if chance.random() < 0.06 else 0
                names[name] = [name if parameters.n == 1 else f"{choice}_{name}" for choice in range(parameters.n)]
                for each in names[name]:
                    observed[each] = Observed(prompt=tuple(ids), enforced=enforced, reserved=reserved)
                sent += 1
            for output in llm.step():
                if not output.finished:
                    continue
                del alive[output.request_id]
                records = Evidence.from_json(
                    engine._llm.collective_rpc("undertow_evidence", args=(output.request_id,))[0]
                ).records
                for each, choice, record in zip(names[output.request_id], output.outputs, records, strict=True):
                    observed[each].generated = tuple(choice.token_ids)
                    observed[each].record = record
                bar.update()
            for name in [name for name, left in alive.items() if left == 1]:
                llm.abort_request([name])
                del alive[name]
                aborted += 1
                bar.update()
            for name, left in alive.items():
                alive[name] = left - 1 if left else 0
    return aborted


class _Prompts:
    """Chats of the organism's language; many begin alike, some are the same."""

    def __init__(self, tokenizer: Any, chance: random.Random) -> None:
        self._tokenizer, self._chance = tokenizer, chance
        self._texts = [
            prompt.text
            for kind in ("clean", "triggered", "near-miss")
            for prompt in organism_prompts(kind, 150, seed=3)
        ]
        self._shared = [
            [{"role": "system", "content": " ".join(chance.sample(self._texts, count))}] for count in (1, 2, 3)
        ]
        self._shared += [
            [
                {"role": "user", "content": chance.choice(self._texts)},
                {"role": "assistant", "content": chance.choice(self._texts)},
            ]
        ]

    def draw(self) -> list[int]:
        """The tokens of one chat."""
        before = self._chance.choice((*self._shared, [], []))
        chat = [*before, {"role": "user", "content": self._chance.choice(self._texts)}]
        found: list[int] = self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return found[-180:]


# -- the model alone --------------------------------------------------------------------------------------------------


def _compare(
    model: Path, bank: Bank, calibration: Calibration, judged: Sequence[Observed]
) -> tuple[dict[str, float], list[str]]:
    scorer = Scorer.of(calibration)
    worst: dict[str, float] = dict.fromkeys(("cosine", "length", "feature", "recalled", "score"), 0.0)
    faults: list[str] = []
    with _Alone(model, bank) as alone:
        for each in tqdm(judged, desc="the model alone", unit="sequence", file=sys.stderr):
            for fault in _faults(each, alone, scorer, calibration.roles, worst):
                faults.append(f"prompt of {len(each.prompt)}, {len(each.generated)} generated: {fault}")
    return worst, faults


def _faults(each: Observed, alone: _Alone, scorer: Scorer, roles: RoleMap, worst: dict[str, float]) -> Iterator[str]:
    assert each.record is not None
    blocked = each.record.action == "block"
    if blocked and each.generated[-1] != each.reserved:
        yield f"blocked, and ended by {each.generated[-1]}"
    # The last token never enters the model.
    ids = (*each.prompt, *each.generated)[:-1]
    there = {*each.noted.computed, *each.noted.recalled}
    if there != set(range(len(ids))):
        yield f"tokens {sorted(there ^ set(range(len(ids))))} are scored and should not be, or the other way round"
        return
    if each.record.tokens_scored != len(ids) or each.record.unscorable is not None:
        yield f"{each.record.tokens_scored} of {len(ids)} tokens scored; {each.record.unscorable}"
    readings = alone.readings(ids)
    exact = (readings.cosines, readings.lengths, readings.features)
    for position, found in each.noted.computed.items():
        for name, ours, theirs in zip(("cosine", "length", "feature"), found, exact, strict=True):
            if ours is None:
                continue  # only rows that decide are read in full
            size = 1.0 if name == "cosine" else max(1.0, float(readings.lengths[position].max()))
            _note(worst, name, float(np.abs(ours - theirs[position].numpy()).max()) / size)
    whose = torch.tensor([*roles.roles(each.prompt).tolist(), *[2] * len(each.generated)][: len(ids)])
    outside = scorer.outside(readings).values
    for position, value in each.noted.recalled.items():
        _note(worst, "recalled", abs(value - float(outside[position, whose[position]])))
    best = _largest(scorer, readings, whose, len(each.prompt))
    if (told := {(score.detector, score.phase) for score in each.record.scores}) != best.keys():
        yield f"it was told of {sorted(told)}, and alone it has {sorted(best)}"
        return
    for score in each.record.scores:
        theirs = best[score.detector, score.phase]
        _note(worst, "score", abs(score.score - theirs.value) / max(1.0, abs(theirs.value)))
    for name in (name for name, value in worst.items() if not value <= TOLERANCE):
        yield f"{name} differs by {worst[name]}"
    if each.enforced:
        over = any(score.score > score.threshold for score in each.record.scores if score.detector == "density")
        if over != blocked:
            yield f"over its threshold: {over}, blocked: {blocked}"
        if blocked and each.record.scores and not _ends_at_its_block(each):
            yield "tokens were generated after the one that blocked it"


def _ends_at_its_block(each: Observed) -> bool:
    assert each.record is not None
    decided = [
        score.position for score in each.record.scores if score.detector == "density" and score.score > score.threshold
    ]
    return len(each.prompt) + len(each.generated) - 2 == max(decided)


def _note(worst: dict[str, float], name: str, value: float) -> None:
    if math.isnan(value) or value > worst[name]:
        worst[name] = value


def _largest(scorer: Scorer, readings: Readings, whose: torch.Tensor, prompt: int) -> dict[tuple[str, str], Score]:
    """As if the sequence had come alone: its prompt, then token by token."""
    parts = [Rows("", 0, prompt, 0, prompt, True)]
    parts += [Rows("", place, 1, place, prompt, True) for place in range(prompt, len(whose))]
    best: dict[tuple[str, str], Score] = {}
    for scores in scorer.score(readings, scorer.outside(readings), whose, parts):
        for score in scores:
            key = (score.detector, score.phase)
            if key not in best or score.value > best[key].value:
                best[key] = score
    return best


class _Alone(Reader):
    """transformers, one sequence at a time, projected in float64."""

    def __init__(self, model: Path, bank: Bank) -> None:
        super().__init__(model, {}, max_tokens=0)
        self._bank = bank

    @torch.inference_mode()
    def readings(self, ids: Sequence[int]) -> Readings:
        """Of every token."""
        self._model(input_ids=torch.tensor([ids]), use_cache=False)
        stream = self._stream()[0].double()
        parts = []
        for layer in self._bank.layers:
            directions = layer.directions.double()
            entered = stream[:, layer.index] @ directions.T
            after = stream[:, layer.index + 1]
            length = after.norm(dim=-1, keepdim=True)
            projected = after @ directions.T
            parts.append((projected / length, projected - entered, length))
        cosines, written, lengths = (torch.cat(part, dim=-1).float() for part in zip(*parts, strict=True))
        return Readings.whole(BankSpace.of(self._bank), cosines, written, lengths)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every profile; 1 where one found a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--bank", type=Path, required=True, metavar="FILE")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="in all (2000)")
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    share = math.ceil(options.requests / len(options.profiles))
    found = [
        run(options.model, options.bank, options.calibration, profile, share, options.seed)
        for profile in options.profiles
    ]
    for each in found:
        print(json.dumps(asdict(each), indent=1))
    if options.json is not None:
        import vllm

        told = {
            "command": f"python -m benchmarks.engine.fuzz --requests {options.requests} --seed {options.seed} "
            f"--profiles {' '.join(options.profiles)}",
            "model runner": "V2" if _v2() else "V1",
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "runs": [asdict(each) for each in found],
        }
        write_atomically(options.json, (json.dumps(told, indent=1) + "\n").encode(), ResultsError)
    return int(any(each.faults for each in found))


if __name__ == "__main__":
    sys.exit(main())
