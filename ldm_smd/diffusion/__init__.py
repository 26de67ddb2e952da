"""The mathematics: torch only, no input or output."""
