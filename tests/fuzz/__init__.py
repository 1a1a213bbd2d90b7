"""Structure-aware fuzzing of everything that the suite reads from strangers.

    kind, seed ──▶ a sound file, mutated ──▶ the commands and readers that a user would run on it ──▶ a verdict
                                             in a worker process with limits of time and memory

A case is named by its kind and seed alone, so that ``python -m tests.fuzz tar 17`` repeats it with its traceback.
"""
