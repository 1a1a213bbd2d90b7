"""Pages that people look at: the packs of a step, the report of a run."""
