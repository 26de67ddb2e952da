"""User interfaces: the page of tools/explore.py, and the demo with its report. No other package imports this one."""
