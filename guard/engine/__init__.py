"""The part of the guard that lives inside vLLM's processes.

worker.py      GuardWorker (`--worker-cls`): wires what follows into one vLLM worker
settings.py    what `--additional-config` says
support.py     which vLLM, and which of its features, can be scored
cached.py      what vLLM's compile cache has to know of the guard
scheduler.py   grammars are not asked about sequences that have ended (`--scheduler-cls`)
probe.py       the op that reads the residual stream of one layer, and its hooks
kernels/       what that op and those after it do: in plain torch, in C++ for a CPU, in Triton for GPUs
readings.py    what the probes saw in one forward pass
ranks.py       what the ranks of a tensor-parallel engine have to agree on before they serve
runner.py      what the guard needs to know of a model runner
runner_v1.py   the private attributes of vLLM's V1 model runner, in one file
runner_v2.py   and those of its V2 model runner
guards.py      one guard per bank: of the base model, and of every adapter
banks.py       several banks for one set of probes
adapters.py    whether the weights that vLLM holds for an adapter are its bank's
step.py        a step's readings to each sequence's largest scores
projection.py  the op that takes directions out of chosen rows, and its hooks
courses.py     which sequences are steered: along what, from which token on
taint.py       which slots of the KV cache hold what was computed under steering
steering.py    the second run of a pass that flagged, and who must not read its KV
ledger.py      per request: scores so far, verdicts, decision
finding.py     what one guard says of one detector and phase
candidate.py   what could guard next, checked; handover.py, reload.py: how it comes to
stop.py        ends a blocked request in the step that judged it
recorder.py    what calibration and tests read: coordinates in bank space, never activations
channel.py     evidence from the worker to the API process
middleware.py  evidence from the API process into its HTTP responses (`--middleware`)
offline.py     a guarded engine without HTTP, for calibration and measurements
calibrate.py   clean prompts to a calibration, through that engine
launch.py      the command line and environment of a guarded vLLM
"""
