"""Checkpoints and weights to ONNX files: where they come from, and the graphs that they are written as."""
