"""The public benchmarks: what they draw, the tree that their official scripts read, and where their scores lie."""
