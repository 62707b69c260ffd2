"""What needs torch. Nothing outside this folder imports it."""
