"""A guarded engine with LoRA adapters, in the engine child."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.e2e.child import EAGER, prompts

Asked = tuple[str, tuple[Any, ...] | None]
"""A text, and what vLLM's LoRARequest is made of: name, number, path and, to have it read again, True."""


class AdapterEngine:
    """A guarded engine with LoRA adapters, and what its guards were dealt."""

    def __init__(self, model: Path, bank: Path, calibration: Path, adapters: list[Any]) -> None:
        from guard.engine.guards import Guards
        from guard.engine.launch import additional_config
        from guard.engine.offline import OfflineEngine
        from guard.fingerprint import read_header

        self.seen: dict[str, tuple[str, list[Any]]] = {}
        """Of every sequence: the adapter of the guard that was given it, and its cosines."""
        self.most = 0
        """Guards that were dealt rows of one step."""
        deal = Guards.deal

        def watch(guards: Guards, *arguments: Any) -> Any:
            dealt = deal(guards, *arguments)
            self.most = max(self.most, len(dealt.shares))
            for share in dealt.shares:
                for rows in share.batch:
                    own = share.readings.cosines[rows.first_row : rows.first_row + rows.count]
                    self.seen.setdefault(rows.sequence, (share.guard.name, []))[1].append(own.clone())
            return dealt

        self._patch = mock.patch.object(Guards, "deal", watch)
        self._patch.start()
        self._engine = OfflineEngine(
            model,
            bank,
            calibration,
            **EAGER,
            extra={
                "additional_config": additional_config(
                    bank, read_header(bank).fingerprint, calibration, adapters=adapters
                ),
                "enable_lora": True,
                "max_lora_rank": 8,
                "max_loras": 4,
                "block_size": 32,
                "enable_prefix_caching": True,
            },
        )

    def close(self) -> None:
        self._engine.close()
        self._patch.stop()

    def status(self) -> Any:
        """What the worker says of itself."""
        import json

        from guard.evidence import WorkerStatus

        answer = self._engine._llm.collective_rpc("undertow_status")[0]
        return WorkerStatus.model_validate(json.loads(answer)["worker"])

    def add(self, name: str, number: int, folder: Path) -> str:
        """Load an adapter as vLLM's API does; the error, or nothing."""
        from vllm.lora.request import LoRARequest

        from guard.errors import UndertowError

        try:
            self._engine._llm.llm_engine.add_lora(LoRARequest(name, number, str(folder)))
        except UndertowError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def ask(self, asked: list[Asked], mode: str, tokens: int = 8) -> list[dict[str, Any]]:
        """All at once: texts, and for each the arguments of vLLM's LoRARequest, or None."""
        import torch
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        from guard.evidence import POLICY_ARGUMENT, Evidence
        from guard.policy import Policy

        detections = {"exceedance": {"action": "block", "threshold": {"fpr": 0.05}}}
        policy = Policy.model_validate({"mode": mode, "detections": detections}).to_wire()
        llm = self._engine._llm
        outputs = llm.generate(
            [self._engine._tokens(prompt) for prompt in prompts([text for text, _ in asked])],
            SamplingParams(temperature=0.0, max_tokens=tokens, extra_args={POLICY_ARGUMENT: policy}),
            use_tqdm=False,
            lora_request=[adapter and LoRARequest(*adapter[:3], load_inplace=len(adapter) > 3) for _, adapter in asked],
        )
        found = []
        for output in outputs:
            evidence = Evidence.from_json(llm.collective_rpc("undertow_evidence", args=(output.request_id,))[0])
            name = next((name for name in self.seen if name.split("-")[0] == output.request_id), None)
            guard, parts = self.seen.pop(name) if name else (None, [])
            found.append(
                {
                    "prompt": list(output.prompt_token_ids),
                    "completion": list(output.outputs[0].token_ids),
                    "cached": output.num_cached_tokens,
                    "guard": guard,
                    "cosines": torch.cat(parts).numpy() if parts else None,
                    "fingerprint": evidence.fingerprint,
                    "record": evidence.records[0],
                }
            )
        return found


@contextmanager
def engine(model: Path, bank: Path, calibration: Path, adapters: list[Any]) -> Iterator[AdapterEngine]:
    """An engine, closed at the end."""
    started = AdapterEngine(model, bank, calibration, adapters)
    try:
        yield started
    finally:
        started.close()


def scenes(
    model: Path, bank: Path, calibration: Path, adapters: list[Any], folders: Mapping[str, Path], texts: list[str]
) -> dict[str, Any]:
    """Everything that the tests look at, on one engine. `folders`: of `red`, `blue` and `grey`, which has no bank.

    The order matters: what fills the last slot comes last.
    """
    who = {name: (name, number, str(folder)) for number, (name, folder) in enumerate(folders.items(), 1)}
    names: list[str | None] = [*who, None]
    found: dict[str, Any] = {}
    with engine(model, bank, calibration, adapters) as running:
        batch = [(text, name) for text in texts for name in names]
        asked: list[Asked] = [(text, who[name] if name else None) for text, name in batch]
        answers = running.ask(asked, "monitor")
        found["watched"] = [(name, answer) for (_, name), answer in zip(batch, answers, strict=True)]
        found["guards in a step"] = running.most
        found["enforced"] = [
            (name, answer) for (_, name), answer in zip(batch, running.ask(asked, "enforce"), strict=True)
        ]
        long = " ".join([*texts, *texts])  # more than a block of the cache
        found["cached"] = [running.ask([(long, who[name])], "monitor")[0] for name in ("red", "blue", "red", "blue")]
        found["other weights, loaded"] = running.add("red", 7, folders["blue"])
        work = folders["red"].with_name("work")
        shutil.copytree(folders["red"], work)
        red = ("red", 1, str(work))
        found["read in place"] = running.ask([(texts[0], (*red, True))], "enforce")[0]
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(folders["blue"] / name, work / name)
        found["changed, not read"] = running.ask([(texts[1], red)], "enforce")[0]
        found["changed and read"] = running.ask([(long, (*red, True))], "enforce")[0]
        shutil.copytree(folders["red"], work, dirs_exist_ok=True)
        found["restored, not read"] = running.ask([(texts[0], red)], "enforce")[0]
        found["restored and read"] = running.ask([(texts[2], (*red, True))], "enforce")[0]
        found["cached with other weights"] = running.ask([(long, red)], "enforce")[0]
        found["base, a slot free"] = running.ask([(texts[0], None)], "monitor")[0]
        found["fourth, loaded"] = running.add("pink", 9, folders["grey"])
        found["base, no slot free"] = running.ask([(texts[0], None)], "enforce")[0]
        found["status"] = running.status()
    return found
