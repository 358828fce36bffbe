"""What Python programs call: compile, load, certify, measure, attention without a spec."""
