"""The live dashboard: `python -m dashboards`."""
