"""How `validate.py` compares two programs: what a pass claims, inputs to run on, and when two values agree."""
