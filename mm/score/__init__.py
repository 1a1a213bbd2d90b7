"""Passes of a model over the samples of an index, whose values become a column beside the shards."""
