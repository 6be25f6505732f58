"""The scores that the demo must reach, as shares of right pictures; shuffled prompts must stay below theirs.

They lie at least three standard deviations of a single run below the mean of several (`benchmarks/demo_runs.py`).
"""

CATEGORIES = {  # of seen prompts
    "single_object": 0.95,
    "two_object": 0.45,
    "counting": 0.62,
    "colors": 0.87,
    "position": 0.72,
    "color_attr": 0.43,
    "place": 0.90,
}
SEEN, HELD_OUT, SHUFFLED = 0.77, 0.51, 0.02
