"""What all attacks on logits share."""
