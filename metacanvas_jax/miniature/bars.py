"""The scores that the demo must reach, as shares of right pictures; shuffled prompts must stay below theirs.

They lie at least three standard deviations of a single run below the mean of several (`benchmarks/demo_runs.py`).
"""

CATEGORIES = {  # of seen prompts
    "single_object": 0.90,
    "two_object": 0.35,
    "counting": 0.65,
    "colors": 0.90,
    "position": 0.75,
    "color_attr": 0.35,
    "place": 0.85,
}
SEEN, HELD_OUT, SHUFFLED = 0.75, 0.50, 0.02
