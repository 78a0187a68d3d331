"""What the guard relies on in vLLM's source, and a check of it that neither imports nor runs vLLM.

    python -m tests.engine.contract FOLDER

FOLDER holds the package `vllm` of some release, such as an unpacked wheel. Printed is a record for
`tests/engine/contracts/`. A release whose record has no faults has been read, not run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RUNNER_V1 = "v1/worker/gpu_model_runner.py:GPUModelRunner"
RUNNER_V2 = "v1/worker/gpu/model_runner.py:GPUModelRunner"
OUTPUTS = "v1/outputs.py"

MEMBERS: dict[str, str] = {
    # runner_v1.py
    RUNNER_V1: "get_model max_num_tokens _dummy_run input_batch input_ids execute_model_state use_async_scheduling "
    "kv_cache_config lora_manager lora_config",
    "v1/worker/gpu_model_runner.py:ExecuteModelState": "logits hidden_states sample_hidden_states slot_mappings",
    "v1/worker/gpu_input_batch.py:InputBatch": "req_ids req_id_to_index num_computed_tokens_cpu num_tokens_no_spec "
    "num_prompt_tokens block_table",
    "v1/worker/block_table.py:BlockTable": "block_size block_table",
    # runner_v2.py
    RUNNER_V2: "get_model max_num_tokens _dummy_run decode_query_len prepare_inputs sampler req_states block_tables "
    "kv_cache_config scheduler_config execute_model_state lora_manager lora_config",
    "v1/worker/gpu/input_batch.py:InputBatch": "req_ids num_scheduled_tokens query_start_loc_np input_ids idx_mapping "
    "idx_mapping_np num_computed_tokens_np prefill_len_np",
    "v1/worker/gpu/states.py:RequestState": "prompt_len prefill_len num_computed_tokens_np",
    "v1/worker/gpu/block_table.py:BlockTables": "block_tables block_sizes",
    "v1/worker/gpu/buffer_utils.py:StagedWriteTensor": "gpu",
    "v1/worker/gpu/buffer_utils.py:UvaBackedTensor": "np",
    "v1/worker/gpu/sample/sampler.py:Sampler": "sample",
    # runner.py
    "v1/kv_cache_interface.py:KVCacheConfig": "num_blocks kv_cache_groups",
    "v1/kv_cache_interface.py:KVCacheGroupSpec": "kv_cache_spec",
    "v1/kv_cache_interface.py:FullAttentionSpec": "",
    "v1/core/sched/output.py:SchedulerOutput": "scheduled_new_reqs num_scheduled_tokens total_num_scheduled_tokens "
    "scheduled_spec_decode_tokens finished_req_ids kv_cache_block_copies",
    "v1/core/sched/output.py:NewRequestData": "req_id prompt_token_ids sampling_params",
    "lora/worker_manager.py:WorkerLoRAManager": "_adapter_manager",
    "lora/model_manager.py:LoRAModelManager": "get_adapter lora_index_to_id",
    # worker.py, stop.py, ahead.py
    "v1/worker/gpu_worker.py:Worker": "load_model compile_or_warm_up_model execute_model sample_tokens shutdown "
    "model_runner vllm_config",
    "v1/worker/worker_base.py:WorkerBase": "model_config cache_config rank",
    f"{OUTPUTS}:ModelRunnerOutput": "req_id_to_index sampled_token_ids logprobs",
    f"{OUTPUTS}:LogprobsLists": "logprob_token_ids logprobs sampled_token_ranks cu_num_generated_tokens",
    f"{OUTPUTS}:AsyncModelRunnerOutput": "get_output",
    "sampling_params.py:SamplingParams": "extra_args stop_token_ids eos_token_id max_tokens",
    # support.py
    "config/vllm.py:VllmConfig": "use_v2_model_runner model_config parallel_config scheduler_config cache_config "
    "compilation_config speculative_config lora_config kv_transfer_config ec_transfer_config watermark_config "
    "additional_config",
    "config/parallel.py:ParallelConfig": "tensor_parallel_size pipeline_parallel_size data_parallel_size "
    "decode_context_parallel_size prefill_context_parallel_size enable_dbo use_ubatching nnodes "
    "distributed_executor_backend",
    "config/scheduler.py:SchedulerConfig": "async_scheduling",
    "config/cache.py:CacheConfig": "enable_prefix_caching kv_sharing_fast_prefill",
    "config/model.py:ModelConfig": "runner_type enable_prompt_embeds dtype get_vocab_size",
    "config/speculative.py:SpeculativeConfig": "method",
    "config/compilation.py:CompilationConfig": "cudagraph_mode",
}
"""What classes have: fields, methods, properties, or attributes that a method of theirs sets."""

PARAMETERS: dict[str, str] = {
    f"{RUNNER_V1}._dummy_run": "self num_tokens",
    f"{RUNNER_V2}._dummy_run": "self num_tokens",
    f"{RUNNER_V2}.prepare_inputs": "self scheduler_output",
    "v1/worker/gpu/sample/sampler.py:Sampler.sample": "self logits",
    "v1/worker/gpu_worker.py:Worker.execute_model": "self scheduler_output",
    "v1/worker/gpu_worker.py:Worker.sample_tokens": "self grammar_output",
    # probe.py takes them by place or by name
    "model_executor/models/llama.py:LlamaDecoderLayer.forward": "self positions hidden_states residual",
    "model_executor/models/qwen2.py:Qwen2DecoderLayer.forward": "self positions hidden_states residual",
    "model_executor/models/gemma2.py:Gemma2DecoderLayer.forward": "self positions hidden_states residual",
    "forward_context.py:get_forward_context": "",
    "forward_context.py:override_forward_context": "forward_context",
}
"""What functions take first, in order."""

CALLS: dict[str, str] = {
    # The methods that runner_v2.py wraps are the ones that a step goes through, and are looked up when they are called.
    f"{RUNNER_V2}.execute_model": "self.prepare_inputs",
    f"{RUNNER_V2}.sample": "self.sampler",
    "v1/worker/gpu/sample/sampler.py:Sampler.__call__": "self.sample",
}
"""What functions call."""

ABSTRACT = {f"{OUTPUTS}:AsyncModelRunnerOutput": {"get_output", "get_kv_connector_output"}}
"""The only abstract methods that a class may have: `ahead.Ending` implements these."""


def faults(package: Path) -> list[str]:
    """What of all this is not so in the package `vllm` at this path."""
    return list(_faults(package))


def digest() -> str:
    """Of what is checked: a record of another digest says nothing."""
    facts = [MEMBERS, PARAMETERS, CALLS, {name: sorted(each) for name, each in ABSTRACT.items()}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _faults(package: Path) -> Iterator[str]:
    for place, names in MEMBERS.items():
        found = _class(package, place)
        if found is None:
            yield f"{place}: no such class"
            continue
        yield from (f"{place}: no `{name}`" for name in names.split() if name not in _members(package, found))
    for place, names in PARAMETERS.items():
        function = _function(package, place)
        if function is None:
            yield f"{place}: no such function"
            continue
        first = [each.arg for each in function.args.posonlyargs + function.args.args]
        if first[: len(names.split())] != names.split():
            yield f"{place}: takes {' '.join(first) or 'nothing'}, expected {names}"
    for place, name in CALLS.items():
        function = _function(package, place)
        calls = [] if function is None else [ast.unparse(each.func) for each in _calls(function)]
        if name not in calls:
            yield f"{place}: does not call {name}"
    for place, known in ABSTRACT.items():
        found = _class(package, place)
        for name in sorted(_abstract(found) - known if found is not None else ()):
            yield f"{place}: `{name}` is abstract, and the guard does not implement it"


@dataclass(frozen=True, slots=True)
class _Class:
    file: str
    node: ast.ClassDef


def _tree(path: Path) -> ast.Module:
    return _parsed(path.resolve())


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text()) if path.exists() else ast.Module([], [])


def _class(package: Path, place: str) -> _Class | None:
    file, name = place.split(":")
    for node in ast.walk(_tree(package / file)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Class(file, node)
    return None


def _function(package: Path, place: str) -> ast.FunctionDef | None:
    file, path = place.split(":")
    name, _, method = path.rpartition(".")
    inside = _class(package, f"{file}:{name}") if name else None
    body = inside.node.body if inside is not None else _tree(package / file).body
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return node
    return None


def _members(package: Path, one: _Class) -> set[str]:
    """Of a class and of its bases, where these are found in its file or in a file that it imports them from."""
    names = set()
    for node in one.node.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    names |= {inner.attr} if ast.unparse(inner.value) == "self" else set()
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign):
            names |= {ast.unparse(target) for target in node.targets}
    for base in (ast.unparse(each) for each in one.node.bases):
        found = _class(package, f"{_home(package, one.file, base)}:{base}")
        if found is not None:
            names |= _members(package, found)
    return names


def _home(package: Path, file: str, name: str) -> str:
    for node in ast.walk(_tree(package / file)):
        if isinstance(node, ast.ImportFrom) and node.module and name in {each.name for each in node.names}:
            return node.module.removeprefix("vllm.").replace(".", "/") + ".py"
    return file


def _calls(function: ast.FunctionDef) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call))


def _abstract(one: _Class) -> set[str]:
    return {
        node.name
        for node in one.node.body
        if isinstance(node, ast.FunctionDef) and "abstractmethod" in {ast.unparse(each) for each in node.decorator_list}
    }


def main() -> int:
    """1 where the contract is broken."""
    folder = Path(sys.argv[1])
    found = faults(folder / "vllm")
    sys.stdout.write(json.dumps({"contract": digest(), "faults": found}, indent=1) + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
