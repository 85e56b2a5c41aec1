"""The numerical debugger: which operation differs, by how much, and who is right.

Entrances: `run.parity` (a model against others and recorded data) and `diff.diff` (two parties). Stages, in order:

subject.py      the model file under test, opened and recognised once
parties.py      who is compared: ours, ONNX Runtime, onnx.reference, recorded data, traces, a user's function
cases.py        the inputs that all of them are run on
capture.py      what they give: outputs and taps
compare.py      outputs pair by pair; metrics.py: how far two arrays are apart; budgets.py: how far they may be
localise.py     two parties tap by tap: total, local and inherited error, and who is closer to float64
explain/        from there to the cause: the usual mistakes, ranked by how much of an error each explains
report.py       tables, JSON, JUnit

operations.py   the forward pass as a list of operations, each under its tap name, in any float dtype
checks.py       cache, batch, causality, determinism, finiteness: checks that need no reference
rounding.py     what a file's own rounding does to its outputs
trace.py        golden traces: taps and outputs in one .npz with a manifest
repro.py        one divergent operation as a model of its own
"""
