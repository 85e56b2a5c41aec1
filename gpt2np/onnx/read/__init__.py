"""Bytes to tensors: the wire format, tensors, external data, sparse initializers, recorded data sets."""
