"""The compiler of fastgrad-dsl: from a checked program to generated code, through passes that can be read."""
