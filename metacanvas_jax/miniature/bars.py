"""The scores that the demo must reach, as shares of right pictures; shuffled prompts must stay below theirs.

They lie at least three standard deviations of a single run below the mean of several (`benchmarks/demo_runs.py`).
"""

CATEGORIES = {  # of seen prompts
    "single_object": 0.95,
    "two_object": 0.40,
    "counting": 0.75,
    "colors": 0.95,
    "position": 0.75,
    "color_attr": 0.38,
    "place": 0.90,
}
SEEN, HELD_OUT, SHUFFLED = 0.79, 0.55, 0.02
