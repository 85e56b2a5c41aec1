"""The numerical debugger: which operation differs, by how much, and who is right.

Entrances: `run.parity` (a model against others and recorded data) and `diff.diff` (two parties). Stages, in order:

subject.py      the model file under test, opened and recognised once
parties.py      who is compared: ours, ONNX Runtime, onnx.reference, recorded data, traces, a user's function
cases.py        the inputs that all of them are run on
capture.py      what they give: outputs and taps
compare.py      outputs pair by pair; metrics.py: how far two arrays are apart; budgets.py: how far they may be;
                forms.py: what a port may give as arrays; shapes.py: what fits where the shape is another one
localise.py     two parties tap by tap: total, local and inherited error, and who is closer to float64
places.py       the interval that a mistake may lie in; the rows that are padding
search.py       which questions are asked of a difference, in which order; wiring.py: of a graph that is no GPT-2 any
                more, beside a sound one or (rebuilt.py) beside its own weights wired as they should be; files.py: of
                two files' weights; recordings.py: of recorded data that alone differs
explain/        from there to the cause: the usual mistakes, ranked by how much of an error each explains
report.py       what was found, as plain data, JSON and JUnit; text.py: what people read

operations.py   the forward pass as a list of operations, each under its tap name, in any float dtype
checks.py       invariances of any party: cache, chunks, prefix, batch, order, causality, determinism, finiteness
replace.py      one party run on with the other's values; digits.py: significant digits by random rounding
rounding.py     what a file's own rounding does to its outputs
trace.py        golden traces: taps and outputs in one .npz with a manifest
repro.py        one divergent operation as a model of its own
"""
