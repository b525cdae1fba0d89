"""What is written beside exported programs, as it is: how to run them, for a reader to change."""
