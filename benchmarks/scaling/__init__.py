"""Many ranks on paper: a model of a training step, faults at scale, and what a few processes here send and take."""
