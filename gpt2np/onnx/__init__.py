"""ONNX files: `reader` (file -> tensors), `recognise` (which tensor is which weight), `writer` (weights -> file)."""
