"""The scores that the demo must reach, as shares of right pictures; shuffled prompts must stay below theirs."""

CATEGORIES = {"single_object": 0.75, "counting": 0.20}  # of prompts of trained combinations
SEEN, HELD_OUT, SHUFFLED = 0.30, 0.25, 0.02
