"""Settings of all tests."""

from hypothesis import settings

# A slow day is no failure: a deadline of 200 ms an example, Hypothesis's own, was missed by a busy machine.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
