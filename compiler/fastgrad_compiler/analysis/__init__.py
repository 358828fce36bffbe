"""What can be proved of a program: ranges of its tensors, and of its logits from the weights."""
