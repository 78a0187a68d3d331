"""GuardWorker: one vLLM worker with the guard inside. Give it to vLLM as `--worker-cls
guard.engine.worker.GuardWorker`.

load_model      read bank and calibration, check that they belong to this model, hook the watched layers
compile/warm up run the model once and see that every watched layer's probe ran
execute_model   forward pass; then read what the probes saw of every token of the step
sample_tokens   sample, judge every sequence, put a token that ends it in the place of what a blocked one sampled
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput

from guard.calibration import Calibration
from guard.control import Wanted
from guard.engine.adapters import shown
from guard.engine.ahead import Ending
from guard.engine.cached import stamp
from guard.engine.candidate import Candidate, Surroundings, check_calibration
from guard.engine.channel import EvidenceServer
from guard.engine.guards import Guards, Seen
from guard.engine.handover import Handover
from guard.engine.judge import Judge
from guard.engine.kernels import WARM_UP
from guard.engine.probe import Probes
from guard.engine.ranks import Sight, check, exchange
from guard.engine.recorder import Keep, Recorder
from guard.engine.runner import Rows, Runner
from guard.engine.runner_v1 import RunnerV1
from guard.engine.runner_v2 import RunnerV2
from guard.engine.settings import BASE, EngineSettings
from guard.engine.steering import Steering
from guard.engine.stop import Endings, Stop, choose_reserved_token, replace_sampled
from guard.engine.support import check_steering, check_support
from guard.engine.turns import Turns
from guard.errors import CalibrationError, ConfigError, EngineError, UnscoredError
from guard.evidence import POLICY_ARGUMENT, AdapterStatus, WorkerStatus
from guard.faults import Fault
from guard.roles import RoleMap
from guard.scores import BankSpace
from guard.version import VERSION

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

# Under vLLM's own logger, so that its log says which bank guards it.
log = init_logger("vllm.undertow")


class GuardWorker(PlatformWorker):  # type: ignore[misc]
    """A vLLM worker that scores every token and ends what its policy blocks."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        check_support(self.vllm_config)
        self._settings = EngineSettings.read(self.vllm_config.additional_config)
        if self._settings.steering:
            check_steering(self.vllm_config, self._settings.policy)
        if self._settings.adapters and self.lora_config is None:
            raise ConfigError("--additional-config: `undertow.adapters`: this engine serves none: add --enable-lora")
        stamp(self.vllm_config.additional_config)
        self._recorder: Recorder | None = None
        self._channel: EvidenceServer | None = None
        self._step: SchedulerOutput | None = None
        self._batch: tuple[Rows, ...] | UnscoredError = ()
        self._steering: Steering | None = None
        self._pass: Seen | UnscoredError | None = None
        self._unscored: Mapping[str, int] = {}
        self._handover = Handover(self._read_candidate, self._take, lambda: self._guards.generation)
        self._ended: dict[str, Stop] = {}

    # -- start --------------------------------------------------------------------------------------------------------

    def load_model(self, **keywords: Any) -> None:
        """Load the weights, then everything that watches them. Raises InputError or EngineError where they do not
        fit."""
        files = self._settings.files()
        self._guards = Guards.load(files, Path(self.model_config.model))
        super().load_model(**keywords)
        v2 = self.vllm_config.use_v2_model_runner
        self._runner: Runner = RunnerV2(self.model_runner) if v2 else RunnerV1(self.model_runner)
        self._probes = Probes(self._runner.model, self._guards.bank, self._runner.capacity)
        log.info("the guard's kernels are %s", self._probes.kernels)
        self._runner.model.register_forward_pre_hook(self._announce)
        tokenizer = self._tokenizer()
        self._turns = Turns(RoleMap.of(tokenizer))
        if not self._turns.map.known:
            log.warning("every prompt token counts as the user's: %s", self._turns.map.reason)
        if self._settings.steering:
            assert isinstance(self._runner, RunnerV1), "`check_steering` refuses the other"
            self._steering = Steering(self._runner, self._guards.bank, self._turns)
        self._reserved = choose_reserved_token(
            tokenizer, self.model_config.get_vocab_size(), self._settings.reserved_token_id
        )
        for calibration in {each.calibration for each in files.values() if each.calibration is not None}:
            self.undertow_load_calibration(str(calibration))
        if not self._guards.judging:
            log.info("no calibration: this engine records for one and cannot serve")

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, then see forward passes go through every probe, on the path that requests take."""
        times = super().compile_or_warm_up_model()
        if self.cache_config.enable_prefix_caching:
            self._guards.cast_shadows(self._runner.slots())
        if self._steering is not None:
            self._steering.start(self.cache_config.enable_prefix_caching)
        ranks = get_tp_group().cpu_group
        difference = max(check(exchange(self._sight(min(rows, self._runner.capacity)), ranks)) for rows in WARM_UP)
        # vLLM takes its output from this rank alone, so this rank's verdicts are the ones to tell.
        if self._guards.judging and self.is_driver_worker:
            self._channel = EvidenceServer(self._guards.evidence)
        for guard in self._guards:
            watched = len(guard.space.layers)
            log.info("guarding %d layers of %s with bank %s", watched, guard.model, guard.bank.fingerprint)
        log.info("the ranks' residual streams differ by %.3g", difference)
        return times

    def _sight(self, rows: int) -> Sight:
        """One forward pass through every probe."""
        self._probes.reset()
        self._runner.dummy_run(rows)
        try:
            return Sight.of(self._probes.read(rows))
        except UnscoredError as error:
            space = BankSpace.of(self._guards.bank)
            return Sight.none(rows, len(space.of_every_token()), len(space.layers), error)

    def shutdown(self) -> None:
        if self._channel is not None:
            self._channel.close()
        super().shutdown()

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter, if its bank is for the weights in its folder. Raises InputError where it is not; what was
        loaded before then stays."""
        if not self._guards.check_adapter(lora_request):
            name = shown(lora_request.lora_name)
            log.warning("adapter %s has no bank: no request that uses it can be scored", name)
        loaded: bool = super().add_lora(lora_request)
        self._guards.loaded(lora_request, self._runner)
        return loaded

    def _tokenizer(self) -> Any:
        from vllm.tokenizers import cached_tokenizer_from_config

        return cached_tokenizer_from_config(self.model_config)

    # -- every step ---------------------------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """The forward pass, and what the probes saw of it."""
        self._turns.finish(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            self._turns.admit(request.req_id, request.prompt_token_ids or ())
        self._admit(scheduler_output)
        if self._steering is not None:
            self._steering.expect(scheduler_output)
        self._step, self._batch = (
            scheduler_output,
            UnscoredError("the forward pass was not announced", "batch_mismatch"),
        )
        try:
            output = super().execute_model(scheduler_output)
        finally:
            self._step = None
        self._pass = None
        # None: the pass was run and waits for its sampling. Anything else: there was nothing to compute.
        if output is None:
            self._runner.forbid(self._reserved)
            self._pass = self._read(scheduler_output)
            if self._steering is not None and self._pass is not None:
                self._ended = self._settled(self._pass, self._steering)
        return output

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Sample, judge, and end what is blocked."""
        output = super().sample_tokens(grammar_output)
        if self._pass is None:
            return output
        if self._steering is not None:
            if isinstance(output, AsyncModelRunnerOutput):
                return Ending(output, self._ended)
            replace_sampled(output, self._ended)
            return output
        if not isinstance(output, AsyncModelRunnerOutput):
            sampled = {name: len(output.sampled_token_ids[index]) for name, index in output.req_id_to_index.items()}
            replace_sampled(output, self._stops(self._pass, sampled))
            return output
        # One token for every decision: with a drafter `support.py` refuses to schedule ahead.
        return Ending(output, self._stops(self._pass, None))

    def _admit(self, step: SchedulerOutput) -> None:
        self._guards.finish(step.finished_req_ids)
        for request in step.scheduled_new_reqs:
            parameters = request.sampling_params
            arguments = parameters.extra_args or {}
            endings = Endings.of(parameters, self._reserved)
            policy = arguments.get(POLICY_ARGUMENT)
            self._guards.admit(request.req_id, policy, endings, request.lora_request)

    def _announce(self, _model: object, _arguments: object) -> None:
        """Just before a forward pass, when vLLM has put its batch together: say which rows to read in full."""
        if self._step is None:
            self._probes.expect(())  # profiling and warm-up
            return
        try:
            self._batch = tuple(self._runner.rows(self._step))
        except UnscoredError as error:
            self._batch = error
            self._probes.expect(())
        else:
            full = self._recorder is not None
            self._probes.expect([row for rows in self._batch for row in (rows.all if full else rows.deciding)])

    def _read(self, step: SchedulerOutput) -> Seen | UnscoredError | None:
        try:
            readings = self._probes.read(step.total_num_scheduled_tokens)
            if isinstance(self._batch, UnscoredError):
                raise self._batch
            batch = self._batch
        except UnscoredError as error:
            log.critical("unscored step: %s", error)
            if not self._guards.judging:
                raise
            # The slots hold scores of what was there before, and nobody can say which they are.
            self._guards.forget()
            self._unscored = dict(step.num_scheduled_tokens)
            return error
        dealt = self._guards.deal(batch, readings, self._runner)
        if self._recorder is not None:
            for share in dealt.shares:
                self._recorder.add(share.readings, self._turns.of(share.batch), share.batch)
        if not self._guards.judging:
            return None
        return self._guards.see(dealt, self._runner.copies(step), self._runner.where)

    def _stops(self, seen: Seen | UnscoredError, sampled: Mapping[str, int] | None) -> Mapping[str, Stop]:
        """Which sequences end now. `sampled`: how many tokens were drawn; None: one for every decision."""
        if isinstance(seen, UnscoredError):
            return self._guards.fail(self._unscored, str(seen), seen.fault)
        if sampled is None:
            sampled = {rows.sequence: int(rows.samples) for rows in seen.batch}
        try:
            return self._guards.judge(seen, sampled, self._runner.where)
        except UnscoredError as error:
            log.critical("unscored step: %s", error)
            return self._guards.fail({rows.sequence: rows.count for rows in seen.batch}, str(error), error.fault)

    def _settled(self, seen: Seen | UnscoredError, steering: Steering) -> dict[str, Stop]:
        """Judged before anything is sampled: what is steered is sampled from its second run."""
        # An engine that steers has one guard: `support.py` refuses adapters beside it.
        judge = self._guards.lone().judge
        assert judge is not None
        own = seen if isinstance(seen, UnscoredError) else seen.passes[0][1]
        stops = {**self._stops(seen, None), **steering.settle(own, judge)}
        self._probes.reset()
        self._runner.forbid(self._reserved)
        return stops

    # -- asked from outside, by collective_rpc or through the channel -------------------------------------------------

    def undertow_status(self) -> str:
        """`WorkerStatus` as JSON, with the evidence channel's address beside it, if this rank has it."""
        if not self._guards.judging:
            raise EngineError("this engine has no calibration: it records for one and cannot serve")
        base, ledgers = self._guards.base, self._guards.ledgers()
        status = WorkerStatus(
            rank=self.rank,
            fingerprint=base.bank.fingerprint if base else None,
            calibration=base.judge.digest if base and base.judge else None,
            generation=self._guards.generation,
            layers=tuple(layer.index for layer in self._guards.bank.layers),
            reserved_token_id=self._reserved,
            detectors=base.judge.supported if base and base.judge else (),
            adapters=tuple(
                AdapterStatus(
                    name=guard.name,
                    fingerprint=guard.bank.fingerprint,
                    calibration=guard.judge.digest,
                    detectors=guard.judge.supported,
                )
                for guard in self._guards
                if guard.name != BASE and guard.judge is not None
            ),
            undertow_version=VERSION,
            vllm_version=vllm.__version__,
            dtype=str(self.model_config.dtype).removeprefix("torch."),
            requests_judged=sum(ledger.requests_judged for ledger in ledgers),
            tokens_scored=sum(ledger.tokens_scored for ledger in ledgers),
            tokens_recalled=sum(ledger.tokens_recalled for ledger in ledgers),
            tokens_missed=sum(ledger.tokens_missed for ledger in ledgers),
            unscorable=sum(ledger.unscorable for ledger in ledgers),
            steering=self._steering is not None,
            flagged=sum(ledger.decided["flag"] for ledger in ledgers),
            blocked=sum(ledger.decided["block"] for ledger in ledgers),
            faults=dict(sum((ledger.faults for ledger in ledgers), Counter[Fault]())),
        )
        channel = None if self._channel is None else self._channel.address
        return json.dumps({"worker": status.model_dump(mode="json"), "channel": channel})

    def undertow_evidence(self, key: str) -> str:
        """`Evidence` of one request as JSON, for engines without an API process."""
        return self._guards.evidence(key).to_json()

    def undertow_load_calibration(self, path: str) -> str:
        """Judge by this calibration from now on; returns its digest. Raises CalibrationError; the old one then
        stays."""
        calibration = Calibration.load(Path(path))
        now = self._surroundings
        guards = [guard for guard in self._guards if guard.bank.fingerprint == calibration.fingerprint]
        if not guards:
            banks = ", ".join(guard.bank.fingerprint for guard in self._guards)
            raise CalibrationError(
                f"{path}: made for the bank {calibration.fingerprint}, this engine guards with {banks}"
            )
        check_calibration(Path(path), calibration, guards[0].bank, now.roles, now.dtype)
        return self._guards.use(calibration, self._judge_of)

    def undertow_prepare(self, ticket: str, wanted: str) -> str:
        """Read and check what shall guard next (`Wanted` as JSON); see `handover.py`, as for the next two."""
        return self._handover.prepare(ticket, wanted)

    def undertow_commit(self, ticket: str) -> str:
        """Guard by what was prepared from now on."""
        return self._handover.commit(ticket)

    def undertow_abandon(self, ticket: str) -> str:
        """Forget what was prepared."""
        return self._handover.abandon(ticket)

    @property
    def _surroundings(self) -> Surroundings:
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        return Surroundings(self._guards.bank, self._turns.map, dtype)

    def _read_candidate(self, wanted: Wanted) -> tuple[Candidate, Judge] | None:
        guard = self._guards.lone()
        if guard.judge is None:
            raise EngineError("this engine has no calibration: it records for one and cannot serve")
        if (wanted.fingerprint, wanted.calibration) == (guard.bank.fingerprint, guard.judge.digest):
            return None
        candidate = Candidate.read(wanted, self._settings, self._surroundings)
        return candidate, self._judge_of(candidate.calibration)

    def _judge_of(self, calibration: Calibration) -> Judge:
        return Judge(calibration, self._settings.policy, self._turns, self._settings.steering)

    def _take(self, following: tuple[Candidate, Judge]) -> None:
        """Between two steps. Whoever has this done empties vLLM's prefix cache: what it holds becomes unknown here."""
        candidate, judge = following
        replaced = candidate.bank is not self._guards.bank
        self._guards.succeed(candidate.bank, judge)
        if replaced:
            self._probes.replace(candidate.bank)
            if self._steering is not None:
                self._steering.replace(candidate.bank, judge)

    def undertow_record(self, keep: Keep) -> None:
        """Record what follows, in place of anything recorded before.

        Raises EngineError where not every token of a request is computed for it, or more than its tokens.
        """
        if self.cache_config.enable_prefix_caching or self._runner.schedules_ahead():
            raise EngineError("recording needs an engine with --no-enable-prefix-caching and --no-async-scheduling")
        spaces = [guard.space for guard in self._guards]
        if len(spaces) > 1:
            raise EngineError(f"recording needs an engine with one bank, this one has {len(spaces)}")
        self._recorder = Recorder(spaces[0], keep)

    def undertow_roles(self) -> str:
        """How the chat template marks who speaks: `RoleMap.to_dict` as JSON."""
        return json.dumps(self._turns.map.to_dict())

    def undertow_write_recording(self, path: str) -> None:
        """Write what was recorded, and record no more. Raises EngineError where nothing was asked for."""
        if self._recorder is None:
            raise EngineError("nothing is being recorded")
        if self.is_driver_worker:  # what the others recorded is the same
            self._recorder.write(Path(path))
        self._recorder = None
