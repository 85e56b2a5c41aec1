"""The numerical debugger: which operation differs, by how much, and who is right.

data.py         recorded sample data (test_data_set_N)
metrics.py      how far two arrays are apart, and whether that is within a budget
operations.py   the forward pass as a list of operations, each under its tap name, in any float dtype
runners.py      the parties: ours, ONNX Runtime, onnx.reference, recorded data, traces, a user's function
arbiter.py      two parties tap by tap: total, local and inherited error, and who is closer to float64
explain/        the cause of a difference: the usual mistakes, ranked by how much of an error each explains
checks.py       cache, batch, causality, determinism, finiteness: checks that need no reference
trace.py        golden traces: taps and outputs in one .npz with a manifest
repro.py        one divergent operation as a model of its own
report.py       tables, JSON, JUnit
"""
