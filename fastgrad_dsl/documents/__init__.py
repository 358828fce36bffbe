"""The JSON documents of a build: what they hold, and how they are read."""
