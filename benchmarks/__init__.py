"""Benchmarks: `python -m benchmarks NAME`. How each is measured is in README.md beside this file."""
