"""What shows: the page of tools/explore.py, and the demo with its report. Nothing else imports it."""
