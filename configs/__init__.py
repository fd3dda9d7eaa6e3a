"""Configurations of the main job; a config is a result: its docstring says what to expect."""
