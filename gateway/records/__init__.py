"""What is written down about requests, and for how long."""
