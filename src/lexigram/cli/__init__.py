"""The command line: one command a stage, no logic. Every option ends in a field of a recipe or an argument of the API."""

from lexigram.cli.app import app, main

__all__ = ["app", "main"]
