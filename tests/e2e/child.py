"""What runs in the engine child: one process that imports vLLM once and starts many engines, one after another.

pytest's own process never imports vLLM, which changes signal handlers, threads and warnings of whoever does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

FAULT_FILE = "UNDERTOW_TEST_FAULT"
"""The environment variable that names the file in which `faulty.FaultyWorker` looks."""
EAGER: dict[str, Any] = {"dtype": "float32", "eager": True, "max_model_len": 512}


def undertow(*words: object) -> int:
    """One of our commands, in this process."""
    from server.cli import main

    return main([str(word) for word in words])


def record(
    model: Path, bank: Path, texts: list[str], max_tokens: int, eager: bool, then: tuple[int, Path] | None = None
) -> list[dict[str, Any]]:
    """Every token's coordinates, what was written, and role as the engine saw them, one entry per prompt.

    `then`: so many prompts, and the bank that takes the first one's place in the running model after them.
    """
    import torch

    from guard.bank import Bank
    from guard.engine.offline import OfflineEngine
    from guard.engine.recorder import Recorder

    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    add = Recorder.add

    def watch(recorder: Recorder, readings: Any, roles: torch.Tensor, batch: Any) -> None:
        # A recording of all has cosines alone; the rest is taken where the recorder is given it.
        written = readings.features[:, readings.features.shape[1] // 2 :]
        for rows in batch:
            span = slice(rows.first_row, rows.first_row + rows.count)
            seen.setdefault(rows.sequence, []).append((written[span].clone(), roles[span].clone()))
        add(recorder, readings, roles, batch)

    with (
        mock.patch.object(Recorder, "add", watch),
        OfflineEngine(model, bank, dtype="float32", eager=eager, max_model_len=512) as engine,
    ):
        first, other = then or (len(texts), bank)
        recording, answers = engine.record(prompts(texts[:first]), max_tokens=max_tokens, keep="all")
        if then is not None:
            engine._llm.collective_rpc(lambda wrapper: wrapper.worker._probes.replace(Bank.load(other)))
            following, others = engine.record(prompts(texts[first:]), max_tokens=max_tokens, keep="all")
            recording, answers = recording | following, answers + others
        headers = engine.roles
    # vLLM names sequences by their number in the order they were asked, with a random tail.
    by_number = {int(name.split("-")[0]): name for name in recording}
    return [
        {
            "coordinates": recording[name].numpy(),
            "written": torch.cat([written for written, _ in seen[name]]).numpy(),
            "roles": torch.cat([roles for _, roles in seen[name]]).tolist(),
            "headers": headers,
            "prompt": answer.prompt_token_ids,
            "completion": answer.token_ids,
        }
        for name, answer in ((by_number[number], answer) for number, answer in enumerate(answers))
    ]


def detection_rates(model: Path, bank: Path, calibration: Path, clean: Path, sets: dict[str, int]) -> list[Any]:
    """How many of each set every rule flags; none of the calibration's own prompts among them."""
    from benchmarks.detection.first_light import measure, texts_of
    from guard.engine.offline import OfflineEngine

    with OfflineEngine(model, bank, calibration, **EAGER) as engine:
        return measure(engine, texts_of(clean), sets)


def plain_answers(model: Path, asked: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What vLLM without the plugin answers to user messages, each with the fields of its chat completion."""
    import os

    from guard.engine.launch import engine_environment

    os.environ.update({**engine_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    from vllm import LLM
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    llm = LLM(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        disable_log_stats=True,
    )
    conversations: list[Any] = [[{"role": "user", "content": text}] for text, _ in asked]
    parameters: list[Any] = []
    for conversation, (_, fields) in zip(conversations, asked, strict=True):
        # The fields as vLLM's own server reads them.
        request = ChatCompletionRequest(messages=conversation, **fields)
        parameters.append(request.to_sampling_params(fields["max_tokens"], {}))
    outputs = llm.chat(conversations, parameters, use_tqdm=False)
    answers = [{"text": output.outputs[0].text, "token_ids": list(output.outputs[0].token_ids)} for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    _forget()
    return answers


def start_error(model: Path, bank: Path, calibration: Path | None = None, **extra: Any) -> tuple[str, str]:
    """The class and the message with which a guarded engine refuses to start."""
    from guard.engine.offline import OfflineEngine
    from guard.errors import UndertowError

    try:
        engine = OfflineEngine(model, bank, calibration, **EAGER, extra=extra)
    except UndertowError as error:
        _forget()
        return type(error).__name__, str(error)
    engine.close()
    return "", "it started"


def start_without_one_hook(model: Path, bank: Path, calibration: Path) -> tuple[str, str]:
    """As `start_error`, with the hook of one watched layer taken away after it was set."""
    from guard.engine import probe

    attach = probe.attach
    calls = []

    def attach_all_but_the_third(*arguments: Any) -> None:
        attach(*arguments)
        calls.append(arguments)
        if len(calls) == 3:
            # Of the layer that ends where the op was hooked in.
            arguments[0][arguments[1].before - 1]._forward_hooks.clear()

    with mock.patch.object(probe, "attach", attach_all_but_the_third):
        return start_error(model, bank, calibration)


def support_error(model: Path, changes: dict[str, object], steers: bool | None = None) -> str:
    """What the guard says of vLLM's configuration with these fields changed, named like `cache_config.field`; empty
    where it agrees. `steers`: what it says of steering there, where the engine's own policy steers or not."""
    from vllm.engine.arg_utils import EngineArgs

    from guard.engine.support import check_steering, check_support
    from guard.errors import UnsupportedEngineError
    from guard.policy import Policy

    arguments = EngineArgs(model=str(model), dtype="float32", enable_prefix_caching=False, async_scheduling=False)
    config = arguments.create_engine_config()
    v2 = changes.pop("use_v2_model_runner", config.use_v2_model_runner)
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        setattr(getattr(config, section) if section else config, field, value)
    try:
        with mock.patch.object(type(config), "use_v2_model_runner", v2):
            if steers is None:
                check_support(config)
            else:
                default = Policy.model_validate({"detections": {"density": {"action": "steer"}}}) if steers else None
                check_steering(config, default)
    except UnsupportedEngineError as error:
        return str(error)
    return ""


class Judged(NamedTuple):
    """What an engine made of some prompts."""

    generated: list[tuple[int, ...]]
    prompt_tokens: list[int]
    records: list[list[Any]]
    """One list of `Record` per rank."""
    status: Any
    """`Status`, of all ranks."""
    channels: int
    """How many ranks have an evidence channel."""


def judged(model: Path, bank: Path, calibration: Path, texts: list[str]) -> Judged:
    """The prompts on an engine of one rank, with the prefix cache and chunked prompts."""
    from guard.engine.offline import OfflineEngine

    with OfflineEngine(model, bank, calibration, **EAGER, extra=CHUNKED) as engine:
        return _judged(engine, texts)


def judged_by_two(
    model: Path, bank: Path, calibration: Path, texts: list[str], spoil: tuple[str, ...]
) -> tuple[list[Judged], list[str]]:
    """The same on two ranks; then once more after each method of `meddled.MeddledWorker` that is named in `spoil`. And
    what the ranks say when they compare what they see: before, and after the last sum is not summed any more."""
    from guard.engine.offline import OfflineEngine

    with (
        _two_ranks("MeddledWorker") as options,
        OfflineEngine(model, bank, calibration, **EAGER, extra=options) as engine,
    ):
        call = engine._llm.collective_rpc
        said = [*call("compare")]
        found = [_judged(engine, texts)]
        for method in spoil:
            call(method)
            found.append(_judged(engine, texts))
        call("find_the_hook")
        call("keep_a_sum")
        return found, [*said, *call("compare")]


def rank_start_error(model: Path, bank: Path, calibration: Path) -> str:
    """What an engine of two ranks says when the second has lost a hook before it started."""
    from guard.engine.offline import OfflineEngine

    with _two_ranks("HalfHookedWorker") as options:
        try:
            engine = OfflineEngine(model, bank, calibration, **EAGER, extra=options)
        except RuntimeError as error:  # vLLM's, from another process
            _forget()
            return str(error)
    engine.close()
    return "it started"


CHUNKED: dict[str, Any] = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 8,
    "block_size": 32,
}


@contextmanager
def _two_ranks(worker: str) -> Iterator[dict[str, Any]]:
    # A machine without as many NUMA nodes; and vLLM waits for its workers to end by themselves, which they never do.
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "0"}
    with mock.patch.dict("os.environ", variables):
        yield {**CHUNKED, "tensor_parallel_size": 2, "worker_cls": f"tests.e2e.meddled.{worker}"}


def _judged(engine: Any, texts: list[str]) -> Judged:

    from vllm import SamplingParams

    from guard.evidence import POLICY_ARGUMENT, Evidence, Status
    from guard.policy import Policy

    engine._llm.reset_prefix_cache()
    policy = Policy.model_validate({"detections": {"density": {"action": "block", "threshold": {"fpr": 0.02}}}})
    parameters = SamplingParams(temperature=0.0, max_tokens=16, extra_args={POLICY_ARGUMENT: policy.to_wire()})
    # Twice: the second time from the cache.
    chats = [engine._tokens(each) for each in prompts(texts)]
    outputs = [output for _ in range(2) for output in engine._llm.generate(chats, parameters, use_tqdm=False)]
    asked = [engine._llm.collective_rpc("undertow_evidence", args=(output.request_id,)) for output in outputs]
    told = [json.loads(answer) for answer in engine._llm.collective_rpc("undertow_status")]
    return Judged(
        generated=[tuple(output.outputs[0].token_ids) for output in outputs],
        prompt_tokens=[len(output.prompt_token_ids) for output in outputs],
        records=[[Evidence.from_json(text).records[0] for text in rank] for rank in zip(*asked, strict=True)],
        status=Status.model_validate({"workers": [answer["worker"] for answer in told]}),
        channels=sum(answer["channel"] is not None for answer in told),
    )


def version_error(version: str, accepted: str | None = None) -> str:
    """What the guard says of a vLLM of this version, with what was never run accepted or not; empty where it agrees."""
    import os

    from guard.engine import support
    from guard.errors import UnsupportedEngineError

    environment = {} if accepted is None else {support.UNTESTED: accepted}
    with mock.patch.object(support.vllm, "__version__", version), mock.patch.dict(os.environ, environment):
        try:
            support.check_version()
        except UnsupportedEngineError as error:
            return str(error)
    return ""


def compile_hashes(model: Path, codes: list[str]) -> list[str]:
    """By what vLLM finds a compiled graph again, where the guard's code is one of these; empty: without the guard's."""
    from vllm.engine.arg_utils import EngineArgs

    from guard.engine import cached

    hashes = []
    for code in codes:
        settings: dict[str, Any] = {"undertow": {"bank": "bank", "fingerprint": "sha256:x"}}
        config = EngineArgs(model=str(model), dtype="float32", additional_config=settings).create_engine_config()
        if code:
            with mock.patch.object(cached, "digest", lambda _folder, code=code: code):
                cached.stamp(config.additional_config)
        hashes.append(config.compute_hash())
    return hashes


def prompts(texts: list[str]) -> list[Any]:
    """One user message each."""
    from guard.prompts import Prompt

    return [Prompt(({"role": "user", "content": text},), None) for text in texts]


def _forget() -> None:
    """Clean up after an engine that did not start."""
    import gc

    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
