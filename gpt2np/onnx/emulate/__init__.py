"""A file run node by node, with the rounding of ONNX Runtime; for the session and the debugger alone."""
