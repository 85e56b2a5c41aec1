"""ONNX files: `read` (file -> tensors), `recognise` (which tensor is which weight), `writer` (weights -> file)."""
