"""Engines that steer, run in the engine child; see child.py."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from guard.evidence import POLICY_ARGUMENT, Evidence, Record
from guard.policy import Policy


@dataclass(frozen=True)
class Ask:
    """One request, greedy."""

    text: str
    steers: bool = True
    salt: str | None = None
    """None: its blocks are found by everybody."""
    max_tokens: int = 24
    ignore_eos: bool = False
    name: str = ""
    after: str = ""
    """The name of an earlier request whose tokens, prompt and answer, come before this one's own."""

    @property
    def policy(self) -> Policy:
        action = "steer" if self.steers else "flag"
        return Policy.model_validate({"detections": {"density": {"action": action, "threshold": {"fpr": 0.01}}}})


@dataclass(frozen=True)
class Said:
    """What came of it."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    record: Record


@dataclass
class Seen:
    """What the layers showed."""

    said: list[Said] = field(default_factory=list)
    left: float = 0.0
    """The largest projection of a steered row on a direction that was taken out of it, in float64."""
    steered: int = 0
    """Rows, per layer."""
    changed: int = 0
    """Other rows of which a bit changed."""
    again: int = 0
    """Passes that ran again."""
    resumed: int = 0
    """Times that a steered sequence was preempted and came back."""
    recalled: int = 0
    """Tokens from the prefix cache."""


def steer(
    model: Path, bank: Path, calibration: Path, rounds: Sequence[Sequence[Ask]], ahead: bool = False, **options: Any
) -> Seen:
    """All requests of a round together, one round after another, on one engine that can steer."""
    import json

    from benchmarks.engine.fuzz import _ahead_if_asked
    from guard.engine.offline import OfflineEngine

    eager = options.pop("eager", True)
    seen = Seen()
    with (
        _ahead_if_asked() if ahead else nullcontext(),
        _watched(seen, eager),
        OfflineEngine(
            model,
            bank,
            calibration,
            dtype="float32",
            eager=eager,
            max_model_len=512,
            steering=True,
            extra={"enable_prefix_caching": True, "block_size": 32, "async_scheduling": ahead, **options},
        ) as engine,
    ):
        by_name: dict[str, Said] = {}
        for number, asks in enumerate(rounds):
            for ask, said in zip(asks, _ask(engine, number, asks, by_name), strict=True):
                by_name[ask.name] = said
                seen.said.append(said)
        status = json.loads(engine._llm.collective_rpc("undertow_status")[0])["worker"]
        seen.recalled = status["tokens_recalled"]
        assert status["steering"]
    return seen


def plain(model: Path, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[tuple[int, ...]]:
    """The tokens that vLLM without the plugin generates, greedy."""
    from guard.engine.launch import engine_environment
    from tests.e2e.child import _forget

    os.environ.update({**engine_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(model), dtype="float32", enforce_eager=True, max_model_len=512, disable_log_stats=True)
    asked: list[Any] = [{"prompt_token_ids": list(ids)} for ids in prompts]
    outputs = llm.generate(asked, SamplingParams(temperature=0.0, max_tokens=max_tokens), use_tqdm=False)
    answers = [tuple(output.outputs[0].token_ids) for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    _forget()
    return answers


def _ask(engine: Any, number: int, asks: Sequence[Ask], before: dict[str, Said]) -> list[Said]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm, tokenizer = engine._llm.llm_engine, engine._llm.get_tokenizer()
    found: dict[str, Said] = {}
    names = [str(1000 * number + index) for index in range(len(asks))]
    for name, ask in zip(names, asks, strict=True):
        own = tokenizer.apply_chat_template(
            [{"role": "user", "content": ask.text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        first = [] if not ask.after else [*before[ask.after].prompt, *before[ask.after].tokens]
        prompt: dict[str, Any] = {"prompt_token_ids": [*first, *own]}
        if ask.salt is not None:
            prompt["cache_salt"] = ask.salt
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=ask.max_tokens,
            ignore_eos=ask.ignore_eos,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={POLICY_ARGUMENT: ask.policy.to_wire()},
        )
        llm.add_request(name, prompt, parameters)
    while llm.has_unfinished_requests():
        for output in llm.step():
            if not output.finished:
                continue
            text = engine._llm.collective_rpc("undertow_evidence", args=(output.request_id,))[0]
            (record,) = Evidence.from_json(text).records
            choice = output.outputs[0]
            found[output.request_id] = Said(
                tuple(output.prompt_token_ids), tuple(choice.token_ids), choice.text, record
            )
    return [found[name] for name in names]


@contextmanager
def _watched(seen: Seen, layers: bool) -> Iterator[None]:
    """Look on; at the `layers` too where they run as Python."""
    import torch

    from guard.engine.projection import Projection
    from guard.engine.runner_v1 import RunnerV1
    from guard.engine.steering import Steering

    attach, expect, again = Projection._attach, Steering.expect, RunnerV1.again

    def attaching(projection: Projection, layer: Any, place: Any) -> None:
        before: list[torch.Tensor] = []

        def enter(_layer: object, _arguments: object, output: Any) -> None:
            before[:] = [output[0].clone(), output[1].clone()]

        def leave(_layer: object, _arguments: object, output: Any) -> None:
            number = int(projection._chosen)
            rows, sets = projection._rows[:number], projection._sets[:number].tolist()
            names = {place: directions for directions, place in projection._known.items()}
            own = [
                (row, [direction for index, direction in names[which] if index == place.index])
                for row, which in zip(rows.tolist(), sets, strict=True)
            ]
            own = [(row, directions) for row, directions in own if directions]
            whole = output[0].double() + output[1].double()
            for row, directions in own:
                left = place.directions[directions].double() @ whole[row]
                seen.left = max(seen.left, float(left.abs().max()))
            seen.steered += len(own)
            others = torch.ones(len(whole), dtype=torch.bool)
            others[[row for row, _ in own]] = False
            for half, old in zip(output, before, strict=True):
                different = half.view(torch.int32) != old.view(torch.int32)
                seen.changed += int(different[others].any(dim=-1).sum())

        if layers:
            layer.register_forward_hook(enter)
        attach(projection, layer, place)
        if layers:
            layer.register_forward_hook(leave)

    def expecting(steering: Steering, step: Any) -> None:
        resumed = step.scheduled_cached_reqs.resumed_req_ids
        seen.resumed += sum(name in steering._courses for name in resumed)
        expect(steering, step)

    def running(runner: RunnerV1, changed: Any) -> None:
        seen.again += 1
        again(runner, changed)

    with (
        mock.patch.object(Projection, "_attach", attaching),
        mock.patch.object(Steering, "expect", expecting),
        mock.patch.object(RunnerV1, "again", running),
    ):
        yield
