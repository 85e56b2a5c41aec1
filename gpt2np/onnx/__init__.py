"""ONNX files: read (file -> tensors), normalise (-> a graph in plain operators), recognise (which part is which).

`evaluate` runs a graph in NumPy; `emulate` runs it with the rounding of ONNX Runtime.
"""
