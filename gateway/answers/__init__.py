"""What a completion becomes before it leaves: hidden reasoning, stops, text."""
