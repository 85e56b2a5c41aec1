"""ONNX files: `reader` (file -> tensors), `recognise` (graph -> which tensor is which weight), `writer` (weights -> file)."""
