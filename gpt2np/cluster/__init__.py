"""Work for more than one process: cut into shards that are named by their content, computed once, and put together.

The result has the same bits whoever computed the shards, in whatever order, and after whatever interruption.
"""
