"""Text from a model that runs token by token: sampling, what a prompt left behind, stops."""
